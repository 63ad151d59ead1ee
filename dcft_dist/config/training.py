"""The sections `[optimizer]`, `[train]`, `[sharding]` and `[checkpoint]`: how the run is trained and saved."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .section import Count, Fraction, Positive, Section


class Optimizer(Section):
    """The optimizer of the fine-tuning."""

    name: Literal["adamw", "sgd"] = Field("adamw", description="`adamw` or `sgd`.")
    lr: Positive = Field(2e-4, description="Peak learning rate of the body.")
    head_lr: Positive | None = Field(None, description="Peak learning rate of the head; absent: `lr`.")
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(0.0, description="Weight decay of matrices (not of vectors).")
    momentum: Fraction = Field(0.0, description="Momentum of SGD.")
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0,
        description="Learning rate of a block over that of the block above it (layer-wise decay); below all: embeddings.",
    )
    pull_to_start: Annotated[float, Field(ge=0.0)] = Field(
        0.0,
        description="After each step the body goes back by `lr` times this share of its way (decoupled L2-SP).",
    )


class Train(Section):
    """The fine-tuning."""

    epochs: Annotated[int, Field(ge=0)] = Field(4, description="Passes over the training data.")
    fall_back: bool = Field(
        True,
        description="Whether epoch 0, the warmed-up head on the pre-trained body, may be the best epoch (the tested one).",
    )
    sampling: Literal["plain", "balanced"] = Field(
        "plain", description="`balanced`: each class is drawn as often as any other, with replacement (single_label)."
    )
    workers: Annotated[int, Field(ge=0)] = Field(
        0, description="Processes of each rank that read training data ahead; 0: none. They change no number."
    )
    metric: str | None = Field(
        None,
        description="Validation metric that chooses the epoch; absent: `accuracy` (single_label), `auroc` (multi_label), "
        "`mae` (regression), `perplexity` (causal_lm), `dice` (segmentation).",
    )
    max_steps: Count | None = Field(
        None, description="Stop after that many steps and say how long all would take; absent: all steps."
    )
    global_batch: Count = Field(32, description="Texts in an optimizer step over all ranks and micro-batches.")
    micro_batch: Count = Field(
        16, description="Texts in one forward of one rank, at most: more are accumulated in equal micro-batches."
    )
    evaluation_batch: Count = Field(64, description="Examples in one forward of one rank when it evaluates.")
    warmup_fraction: Fraction = Field(0.1, description="Share of the steps with a rising learning rate; then cosine.")
    final_lr_fraction: Fraction = Field(0.0, description="Learning rate at the end over the peak.")
    clip_grad_norm: Positive | None = Field(None, description="Largest gradient norm; absent: no clipping.")
    clip_order: Literal["before_penalty", "after_penalty"] | None = Field(
        None, description="Whether clipping sees plain or penalised gradients; to be given with `clip_grad_norm`."
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="`bf16`: computes in bfloat16; weights and reduction stay in float32."
    )


class Sharding(Section):
    """How the engine shards. `replicas` and `offload` are errors where the engine cannot; others pass over `zero_stage`."""

    replicas: Count = Field(
        1, description="`fsdp2`, `fsdp1`: groups of ranks that each hold all weights (hybrid sharding: one group a node)."
    )
    offload: bool = Field(
        False, description="Weights (FSDP) or optimizer partitions (DeepSpeed, stages 1 to 3) stay in CPU memory."
    )
    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(2, description="`deepspeed`: ZeRO stage.")


class Checkpoint(Section):
    """What is saved to go on from. Each epoch's end, and a request to stop, always leave a checkpoint."""

    every: Count | None = Field(None, description="Steps between further checkpoints; absent: none.")
    keep_last: Annotated[int, Field(ge=0)] = Field(
        1, description="Newest checkpoints to keep; 0: none is made, and a run that is cut off starts its training again."
    )
    keep_best: Count = Field(1, description="Best epochs to keep.")
