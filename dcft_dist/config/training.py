"""The sections `[optimizer]`, `[train]`, `[sharding]` and `[checkpoint]`: how a run trains, shards and saves."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .section import Count, Fraction, Positive, Section

NotNegative = Annotated[float, Field(ge=0.0)]


class WeightGroup(Section):
    """An entry of `[[optimizer.groups]]`: weights with another learning rate or weight decay."""

    pattern: str = Field(description="Name of a module or weight, or a glob over whole names.")
    lr_scale: NotNegative = Field(
        1.0, description="Multiplies their learning rate in fine-tuning; 0 leaves them as they are."
    )
    weight_decay: NotNegative | None = Field(None, description="Their weight decay, of vectors too; absent: the usual one.")


class Optimizer(Section):
    """The optimizer for fine-tuning."""

    name: Literal["adamw", "sgd", "own"] = Field(
        "adamw",
        description="Optimizer: `adamw`, `sgd`, or `own`: the one of `build`; if you set `build`, this value is chosen "
        "automatically.",
    )
    build: str | None = Field(
        None,
        description="Import path of an optimizer of torch or of another package, such as `torch.optim.NAdam`, or of your "
        "own. It is tried on a small weight first. Refused: one that needs a closure, keeps weights of its own, or has a "
        "state that checkpoints cannot keep. One that looks at whole tensors works where tensors are not flattened.",
    )
    args: dict[str, Any] = Field({}, description="Keyword arguments of `build`, besides the learning rate and weight decay.")
    lr: Positive = Field(2e-4, description="Peak learning rate of the body.")
    head_lr: Positive | None = Field(None, description="Peak learning rate of the head; absent: `lr`.")
    weight_decay: NotNegative = Field(0.0, description="Weight decay of matrices; vectors have none.")
    betas: Annotated[list[Annotated[float, Field(ge=0.0, lt=1.0)]], Field(min_length=2, max_length=2)] = Field(
        [0.9, 0.999], description="AdamW: decay of the averages of the gradient and of its square."
    )
    eps: Positive = Field(1e-8, description="AdamW: added to the denominator.")
    momentum: Fraction = Field(0.0, description="Momentum of SGD.")
    fused: bool = Field(
        True,
        description="Whether torch's fused kernel makes AdamW's step; `false`: torch's default, which is its multi-tensor "
        "(foreach) implementation on a GPU and a loop on a CPU. The results differ by rounding. SGD has no fused kernel for "
        "sharded weights.",
    )
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0,
        description="Layer-wise decay: the learning rate of a block is this number times the rate of the next block, nearer "
        "to the output. The embeddings count as one more block, before the first.",
    )
    groups: list[WeightGroup] = Field(
        [],
        description="Weights with another learning rate or weight decay, each entry with `pattern`, `lr_scale` and "
        "`weight_decay` (docs/choices.md). A weight belongs to the first entry that matches it. `lr_scale` multiplies "
        "`layer_decay` and `head_lr` too.",
    )
    pull_to_start: Annotated[float, Field(ge=0.0)] = Field(
        0.0,
        description="Decoupled L2-SP: after each step every body weight moves back towards its pre-trained value, by `lr` "
        "times this number times the distance. It follows a penalty, if there is one. `lr` times the largest pull must be "
        "at most 1.",
    )
    pull_by_importance: Fraction = Field(
        0.0,
        description="How much the pull depends on importance, *a*: a weight is pulled `1 - a + a g` times as strongly. g "
        "grows from 0 to 2 with the weight's level among 256 quantiles of the scores; it is 1 for weights without a score.",
    )
    pull_selective: bool = Field(
        False,
        description="Whether a tensor is pulled only while its descent direction points back to its start (Selective "
        "Projection Decay). It then goes back by `pull_to_start`, at most 1, times what its last step has added to its "
        "distance; `lr` has no part in it.",
    )
    pull_levels: Literal["scores", "permuted"] = Field(
        "scores",
        description="`scores`: levels of the scores. `permuted`: a control, with the levels permuted within each tensor and "
        "magnitude bin.",
    )

    @property
    def kind(self) -> str:
        """`adamw`, `sgd`, or the import path of `build`."""
        return self.build or self.name

    @property
    def decays(self) -> bool:
        """Whether any weight has weight decay."""
        return self.weight_decay > 0.0 or any(group.weight_decay for group in self.groups)

    @model_validator(mode="before")
    @classmethod
    def _own_if_built(cls, values: Any) -> Any:
        return {**values, "name": "own"} if isinstance(values, dict) and values.get("build") else values

    @model_validator(mode="after")
    def _is_one_kind(self) -> Optimizer:
        if (self.name == "own") != (self.build is not None):
            raise ValueError("name = 'own' needs build: the import path of an optimizer")
        if self.args and self.build is None:
            raise ValueError("args are for an optimizer of `build`")
        if taken := [key for key in ("params", "lr", "weight_decay") if key in self.args]:
            raise ValueError(f"args: {taken[0]} has a key of its own in [optimizer]")
        others = {"adamw": (), "sgd": ("betas", "eps"), "own": ("betas", "eps", "momentum")}[self.name]
        if unused := [key for key in others if getattr(self, key) != type(self).model_fields[key].default]:
            raise ValueError(f"{unused[0]} does nothing for {self.kind}" + (": put it into args" if self.build else ""))
        return self


class Train(Section):
    """Fine-tuning."""

    epochs: Annotated[int, Field(ge=0)] = Field(4, description="Passes over the training data.")
    fall_back: bool = Field(
        True,
        description="Whether epoch 0 (warmed-up head, pre-trained body) may be the best epoch, which is the tested one.",
    )
    sampling: Literal["plain", "balanced"] = Field(
        "plain",
        description="`plain`: each example once in an epoch. `balanced`: every class equally often, drawn with replacement "
        "(single_label).",
    )
    workers: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Processes of each rank that read training data in advance; 0: none. The results do not depend on it.",
    )
    metric: str | None = Field(
        None,
        description="Validation metric that chooses the best epoch; absent: `accuracy` (single_label), `auroc` "
        "(multi_label), `mae` (regression), `perplexity` (causal_lm), `dice` (segmentation).",
    )
    mixup: NotNegative = Field(
        0.0,
        description="Images, volumes: alpha of MixUp, which blends pairs of training examples and their labels; 0: off.",
    )
    cutmix: NotNegative = Field(
        0.0,
        description="Images, volumes: alpha of CutMix, which puts a box of one training example into another; 0: off. With "
        "both, each is taken half of the time.",
    )
    ema: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None,
        description="Decay of an exponential moving average of the weights, such as 0.999, which is then validated, tested "
        "and exported in place of the weights. It takes 4 bytes a trained weight, sharded. With batch normalisation its "
        "statistics are taken again on the training data at each validation.",
    )
    patience: Count | None = Field(
        None,
        description="Stop the fine-tuning after this many epochs without a better `metric` on the validation data; absent: "
        "all epochs. The schedule of the learning rate does not change.",
    )
    calibrate: bool = Field(
        False,
        description="Whether the head is divided by the temperature that fits the validation data best, before the test "
        "(single_label, multi_label; a head of one linear layer).",
    )
    max_steps: Count | None = Field(
        None, description="Stop after this many steps and estimate how long all steps would take; absent: all steps."
    )
    global_batch: Count = Field(32, description="Examples in an optimizer step, over all ranks and micro-batches.")
    micro_batch: Count = Field(
        16,
        description="Maximum number of training examples in one forward pass of one rank. A rank with more accumulates the "
        "gradients of equal micro-batches.",
    )
    evaluation_batch: Count = Field(64, description="Examples in one forward pass of one rank during evaluation.")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine",
        description="How the learning rate falls after its warm-up. `cosine`, `linear`: over all other steps. `constant`: "
        "not at all. `wsd` (warm-up, stable, decay): linearly, over the last `decay_fraction` of the steps.",
    )
    warmup_fraction: Fraction = Field(0.1, description="Share of the steps with rising learning rate.")
    decay_fraction: Fraction = Field(0.1, description="`wsd`: share of the steps with falling learning rate.")
    final_lr_fraction: Fraction = Field(
        0.0, description="Learning rate at the end, as a multiple of the peak; not for `constant`."
    )
    clip_grad_norm: Positive | None = Field(None, description="Maximum gradient norm; absent: no clipping.")
    clip_order: Literal["before_penalty", "after_penalty"] | None = Field(
        None, description="Whether gradients are clipped before or after the penalty; required with `clip_grad_norm`."
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="`fp32`: computes in float32. `bf16`: computes in bfloat16; weights and gradient reduction stay in "
        "float32.",
    )
    activation_checkpointing: Literal["none", "blocks", "selective"] = Field(
        "none",
        description="What the backward computes again instead of keeping it in memory. `none`: nothing. `blocks`: "
        "everything inside a block of the model; only its input is kept. `selective`: the same without matrix products, "
        "convolutions and attention, which are kept: more memory, less time.",
    )
    activations_on_host: bool = Field(
        False,
        description="Whether what a block keeps for the backward waits in host memory: with `blocks` its input, with "
        "`none` everything but its weights. Saves memory of the GPU, and takes the time of the copies.",
    )
    compile: str | None = Field(
        None,
        description="Backend of torch.compile for the blocks of the model, such as `inductor`; absent: no compilation.",
    )

    profile: list[Count] = Field(
        [],
        description="First and last of the steps to profile, such as `[20, 22]`: `profile/` in the run's folder gets a "
        "trace of each rank by torch.profiler, and on a GPU a snapshot of its memory. [] profiles nothing.",
    )

    @model_validator(mode="after")
    def _decays_after_the_warmup(self) -> Train:
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1.0:
            raise ValueError("warmup_fraction and decay_fraction are more than all steps together")
        return self


class Sharding(Section):
    """How the engine shards. Not every engine supports `replicas` and `offload`; only `deepspeed` uses `zero_stage`."""

    replicas: Count = Field(
        1,
        description="`fsdp2`, `fsdp1`: number of groups of ranks. Each group shards one full copy of the weights (hybrid "
        "sharding: one group for each node).",
    )
    tensor_parallel: Count = Field(
        1,
        description="`fsdp2`: number of neighbouring ranks that share the layers of a model and compute each batch together "
        "(tensor parallelism), within a node. For models of transformers that bring a plan, which decoders do. The other "
        "ranks shard as without.",
    )
    offload: bool = Field(
        False, description="Keep weights (FSDP) or optimizer partitions (DeepSpeed, stages 1 to 3) in CPU memory."
    )
    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(2, description="`deepspeed`: ZeRO stage.")
    reduce: Literal["auto", "last", "each"] = Field(
        "auto",
        description="When the gradients of several micro-batches are reduced over the ranks. `last`: once, after the last "
        "one; until then each rank keeps the gradients of the whole model, 4 bytes a weight. `each`: after each. `auto`: "
        "`each` if gradients of the whole model take more than a quarter of a GPU's memory, else `last`. `ddp` keeps whole "
        "gradients in any case, and `deepspeed` decides by itself.",
    )
    prefetch: Annotated[int, Field(ge=0)] = Field(
        0, description="`fsdp2`: number of blocks of which weights are gathered in advance; 0: FSDP2 decides by itself."
    )


class Checkpoint(Section):
    """Checkpoints for continuing a run. One is saved after every epoch and at every request to stop."""

    every: Count | None = Field(None, description="Steps between additional checkpoints; absent: none.")
    keep_last: Annotated[int, Field(ge=0)] = Field(
        1,
        description="Number of newest checkpoints to keep; 0: none is saved, and an interrupted run restarts its training.",
    )
    keep_best: Count = Field(1, description="Number of best epochs to keep.")
    background: bool = Field(
        False,
        description="Whether checkpoints are written beside the training, which then only waits while they are copied: each "
        "rank needs its part of weights and optimizer state once more in host memory.",
    )
    staging: str | None = Field(
        None,
        description="With `background`: a folder on a disk of the node, such as `$TMPDIR`. Checkpoints are written there "
        "and copied to the run's folder beside the training, so they need no host memory. Environment variables are "
        "replaced on each node. Absent: host memory.",
    )

    @model_validator(mode="after")
    def _staged_in_the_background(self) -> Checkpoint:
        if self.staging is not None and not self.background:
            raise ValueError("checkpoint.staging needs checkpoint.background = true: what waits is copied by a thread")
        return self
