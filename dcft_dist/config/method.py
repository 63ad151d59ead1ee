"""The sections of the method: `[head_warmup]`, `[importance]`, `[selection]`, `[penalty]`, `[removal]`, and `[lora]`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .section import Count, Fraction, Positive, Section


class HeadWarmup(Section):
    """Training of the new head alone, before scoring; stops on validation loss."""

    lr: Positive = Field(3e-3, description="Learning rate of AdamW.")
    batch: Count = Field(256, description="Texts in a batch over all ranks (the body's features are computed once).")
    max_epochs: Annotated[int, Field(ge=0)] = Field(200, description="Epochs at most; 0: a cold head.")
    patience: Count = Field(5, description="Epochs without a better validation loss before it stops.")


class Importance(Section):
    """How weights are scored."""

    criterion: Literal["taylor", "taylor_squared", "removal", "fisher", "obs", "magnitude", "random"] = Field(
        "fisher", description="Importance criterion (docs/method.md)."
    )
    num_samples: Count = Field(1024, description="Training texts to score on; a multiple of `score_batch`.")
    score_batch: Count = Field(32, description="Texts in a score batch over all ranks: part of the criterion.")
    after_epochs: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Epochs of fine-tuning before the weights are scored; all is then put back to where it was.",
    )
    rounds: Count = Field(
        1, description="Rounds of those epochs: between two of them the lowest weights become zero (gradual pruning)."
    )
    block: Count = Field(192, description="`obs`: consecutive weights of a block of the Fisher matrix.")
    damping: Positive = Field(1e-2, description="`obs`: added to the diagonal of the Fisher matrix.")
    eligible: list[str] | None = Field(
        None,
        description="Patterns of the weights to score (globs over names, such as `backbone.encoder.layer.5.*`, or names "
        "of modules); absent: linear and convolution weights outside the head.",
    )


class Selection(Section):
    """Which weights are fundamental."""

    fraction: Fraction | Literal["auto"] = Field(
        0.10,
        description="Share of the eligible weights to select. `auto`: the one whose removal raises the validation loss most "
        "over that of the matched random set.",
    )
    kind: Literal["top", "lowest", "random", "random_tensor", "random_magnitude"] = Field(
        "top",
        description="`top`: the highest scores. Controls with as many weights: `lowest` scores; `random`; `random_tensor`: "
        "random, as many in each tensor as `top`; `random_magnitude`: random, as many in each tensor and magnitude bin.",
    )
    scope: Literal["global", "per_tensor"] = Field("global", description="One ranking for the whole model, or one a tensor.")
    floor: Fraction = Field(0.0, description="Least share of each tensor.")
    cap: Fraction = Field(1.0, description="Largest share of each tensor.")


class Penalty(Section):
    """Multipliers of gradient or update."""

    factor: Fraction = Field(0.1, description="Multiplier of the fundamental weights.")
    schedule: Literal["constant", "linear", "cosine", "learned"] = Field(
        "constant",
        description="`linear`, `cosine`: from `factor` to `final_factor` over all steps. `learned`: from `factor` on, by "
        "the gradient of the validation loss (update level).",
    )
    final_factor: Fraction = Field(1.0, description="Factor of the last step, if scheduled.")
    learn_every: Count = Field(4, description="Steps between two changes of a learned factor.")
    learn_rate: Positive = Field(0.05, description="Change of a learned factor, about.")
    rest_factor: Fraction = Field(1.0, description="Multiplier of the other eligible weights.")
    unscored_factor: Fraction = Field(1.0, description="Multiplier of weights that are neither eligible nor head.")
    level: Literal["auto", "gradient", "update"] = Field(
        "auto", description="`auto`: gradient for SGD without weight decay, update for everything else."
    )
    where: Literal["before", "after"] = Field("before", description="Gradient level: before or after the reduction.")
    mask_placement: Literal["replicated", "sharded"] = Field(
        "replicated",
        description="Gradient level before the reduction: each rank has the bits of all weights, or a part that is gathered "
        "when a gradient is ready.",
    )


class Lora(Section):
    """Low-rank adapters, for `method = "lora"`: every linear layer of the body gets one."""

    rank: Count = Field(8, description="Rank of the adapters.")
    alpha: Count = Field(16, description="Their output is scaled by alpha / rank.")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="Dropout before the adapters.")


class Removal(Section):
    """The removal check: validation loss with sets of weights zeroed."""

    fractions: list[Fraction] = Field(
        [0.001, 0.01, 0.1], description="Shares of the eligible weights to remove; [] skips it."
    )
    num_samples: Count | None = Field(None, description="Validation texts to use; absent: all.")
