"""How the training methods differ: which weights they train, and what they do around an optimizer step."""

from __future__ import annotations

from ..config.schema import Config
from ..controls.step_controls import EqualDisplacement
from ..engines.names import ParameterNames, matrix_names
from ..engines.prepared import Prepared
from ..errors import ConfigError
from ..method.fundamental_set import FundamentalSet
from ..method.levels import Levels
from ..method.penalty import Penalty, attach_penalty
from ..method.pull import PullToStart
from ..models.pretrained import Pretrained
from .adapters import insert_adapters


def choose_trained(pretrained: Pretrained, config: Config) -> None:
    """Freezes the weights that the method does not train, or inserts adapters into the body. Call it before wrapping.

    `bitfit` freezes all but biases and head. `lora` and `lora_dcft` insert adapters and freeze the rest of the body, but for
    `lora.beside`. Other methods train every weight.

    Args:
        pretrained: the model, changed in place.
        config: its `method` and `lora` are used.

    Raises:
        DataError: adapters without the package peft.
        ConfigError: `lora_dcft` has nothing to score by default.
        PatternError: a pattern in `lora.beside` matches nothing.
    """
    head = set(pretrained.head_names)
    if config.method == "bitfit":
        for name, parameter in pretrained.module.named_parameters():
            parameter.requires_grad_(name.endswith("bias") or name in head)
    elif config.has_adapters:
        insert_adapters(pretrained.module, head, config.lora)
        if config.method == "lora_dcft" and not config.importance.eligible:
            _check_default(pretrained, config)


def _check_default(pretrained: Pretrained, config: Config) -> None:
    """Checks that the weights beside adapters include some that are scored without being named.

    Raises:
        ConfigError: they do not.
    """
    names = ParameterNames.of(pretrained.module)
    beside = names.match(config.lora.beside, what="lora.beside")
    if not set(beside) & set(matrix_names(pretrained.module, names)):
        raise ConfigError(
            "lora.beside has no weights of linear or convolution layers: name what to score in importance.eligible, such as "
            f"{beside[0]!r}"
        )


def begin(
    prepared: Prepared, fundamental: FundamentalSet | None, levels: Levels | None, config: Config, head: tuple[str, ...]
) -> Penalty | None:
    """Attaches what the method does around each optimizer step. Collective.

    Args:
        prepared: the wrapped model and its optimizer.
        fundamental: the fundamental set; None if the method uses none.
        levels: levels of the weights; None if no pull depends on them.
        config: its `method`, `penalty` and `optimizer.pull_to_start` are used.
        head: patterns of the head's weights.

    Returns:
        The attached penalty; None if the method uses none.
    """
    settings, penalty = config.penalty, None
    factors = {"rest_factor": settings.rest_factor, "unscored_factor": settings.unscored_factor}
    if fundamental is not None and config.method == "equal_displacement":
        EqualDisplacement(prepared.model, fundamental, settings.factor, optimizer=prepared.optimizer, **factors)
    elif fundamental is not None:
        penalty = attach_penalty(
            prepared.model,
            fundamental,
            settings.factor,
            optimizer=prepared.optimizer,
            level=config.level if config.optimizer.build else settings.level,
            where=settings.where,
            mask_placement=settings.mask_placement,
            **factors,
        )
    if config.optimizer.pull_to_start:
        PullToStart(
            prepared.model,
            head,
            config.optimizer.pull_to_start,
            prepared.optimizer,
            by_importance=config.optimizer.pull_by_importance,
            levels=levels,
            selective=config.optimizer.pull_selective,
        )
    return penalty
