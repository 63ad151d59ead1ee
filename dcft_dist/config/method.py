"""The sections of the method: `[head_warmup]`, `[importance]`, `[selection]`, `[penalty]`, `[lora]` and `[removal]`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .section import Count, Fraction, Positive, Section


class HeadWarmup(Section):
    """Trains the new head alone, before scoring. It stops early on the validation loss."""

    lr: Positive = Field(3e-3, description="Learning rate of AdamW.")
    batch: Count = Field(256, description="Examples in a batch over all ranks, if the body's features are computed once.")
    max_epochs: Annotated[int, Field(ge=0)] = Field(
        200, description="Maximum number of epochs; 0: no warm-up, the head stays random."
    )
    patience: Count = Field(
        5, description="Stop after this many epochs, and at least 10 steps, without a lower validation loss."
    )


class Importance(Section):
    """How weights are scored."""

    criterion: Literal["taylor", "taylor_squared", "removal", "fisher", "obs", "magnitude", "random"] = Field(
        "fisher",
        description="Importance criterion. `taylor`: first-order Taylor term. `taylor_squared`: its mean square. `removal`: "
        "first and second Taylor term, signed. `fisher`: mean squared gradient. `obs`: optimal brain surgeon. `magnitude`: "
        "absolute weight. `random`: a control. Formulas: docs/method.md.",
    )
    num_samples: Count = Field(1024, description="Training examples to score on; a multiple of `score_batch`.")
    score_batch: Count = Field(
        32, description="Examples in a score batch over all ranks. Another size is another criterion: it changes the scores."
    )
    after_epochs: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Epochs of fine-tuning before scoring. After scoring the weights return to their values before these "
        "epochs.",
    )
    rounds: Count = Field(
        1,
        description="Splits `after_epochs` into this many rounds (gradual pruning). Between two rounds the weights with the "
        "lowest scores become zero. Only for the criteria `obs`, `taylor_squared`, `taylor` and `magnitude`, which rank "
        "zero weights last.",
    )
    block: Count = Field(192, description="`obs`: number of consecutive weights in a block of the Fisher matrix.")
    damping: Positive = Field(1e-2, description="`obs`: value added to the diagonal of the Fisher matrix.")
    eligible: list[str] | None = Field(
        None,
        description="Patterns of the weights to score: globs over names, such as `backbone.encoder.layer.5.*`, or names of "
        "modules. Absent: weights of linear and convolution layers outside the head.",
    )


class Selection(Section):
    """Which weights are fundamental."""

    fraction: Fraction | Literal["auto"] = Field(
        0.10,
        description="Share of the eligible weights to select. `auto`: tries six shares from 0.1 to 30 % and takes the one "
        "where removal raises the validation loss most, relative to removal of the matched random set.",
    )
    kind: Literal["top", "lowest", "random", "random_tensor", "random_magnitude"] = Field(
        "top",
        description="`top`: the highest scores. The others are controls of the same size. `lowest`: the lowest scores. "
        "`random`: random weights. `random_tensor`: random, with as many weights in each tensor as `top`. "
        "`random_magnitude`: random, with as many weights in each tensor and magnitude bin as `top`.",
    )
    scope: Literal["global", "per_tensor"] = Field(
        "global", description="`global`: one ranking over the whole model. `per_tensor`: one ranking for each tensor."
    )
    floor: Fraction = Field(0.0, description="Minimum share to select in each tensor.")
    cap: Fraction = Field(1.0, description="Maximum share to select in each tensor.")


class Penalty(Section):
    """Multipliers of the gradient or of the update."""

    factor: Fraction = Field(0.1, description="Multiplier of the fundamental weights.")
    schedule: Literal["constant", "linear", "cosine", "learned"] = Field(
        "constant",
        description="`constant`: always `factor`. `linear`, `cosine`: from `factor` to `final_factor` over all steps. "
        "`learned`: starts at `factor` and follows the gradient of the validation loss (update level only).",
    )
    final_factor: Fraction = Field(1.0, description="`linear`, `cosine`: factor at the last step.")
    learn_every: Count = Field(4, description="`learned`: steps between two changes of the factor.")
    learn_rate: Positive = Field(0.05, description="`learned`: approximate size of one change of the factor.")
    rest_factor: Fraction = Field(1.0, description="Multiplier of the other eligible weights.")
    unscored_factor: Fraction = Field(1.0, description="Multiplier of weights that are neither eligible nor in the head.")
    level: Literal["auto", "gradient", "update"] = Field(
        "auto",
        description="What is multiplied. `gradient`: the gradient. `update`: the optimizer's step. `auto`: `gradient` for "
        "SGD without weight decay, `update` for everything else.",
    )
    where: Literal["before", "after"] = Field(
        "before", description="Gradient level: multiply before or after the gradients are reduced over the ranks."
    )
    mask_placement: Literal["replicated", "sharded"] = Field(
        "replicated",
        description="Gradient level before the reduction. `replicated`: each rank stores the mask bits of all weights. "
        "`sharded`: each rank stores a part, and the ranks gather a weight's bits when its gradient is ready.",
    )


class Lora(Section):
    """Low-rank adapters, for the methods `lora` and `lora_dcft`."""

    target_modules: list[str] = Field(
        [],
        description="Linear layers of the body that get an adapter: ends of their names, such as `q_proj`, as in peft, or "
        "globs over whole names. []: all.",
    )
    beside: list[str] = Field(
        [],
        description="Patterns of body weights that are trained beside the adapters, such as the norms or the last block. "
        "Their layers get no adapter.",
    )

    rank: Count = Field(8, description="Rank of the adapters.")
    alpha: Count = Field(16, description="The adapters' output is multiplied by alpha / rank.")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="Dropout rate on the adapters' input.")


class Removal(Section):
    """The removal check: validation loss after sets of weights are set to zero."""

    fractions: list[Fraction] = Field(
        [0.001, 0.01, 0.1], description="Shares of the eligible weights to remove; [] skips the check."
    )
    num_samples: Count | None = Field(None, description="Number of validation examples to use; absent: all.")
