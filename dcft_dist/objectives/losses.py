"""Training losses by name (`task.loss`), from torch and MONAI: for imbalanced classes, outliers, and small structures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ConfigError, line_of
from .regression import Regression

Loss = Callable[[Tensor, Tensor], Tensor]  # (outputs [size, ...] in float32, labels [size, ...]) -> [size]

# kind of the task -> name -> class of monai.losses
_MONAI = {
    "single_label": {"focal": "FocalLoss"},
    "multi_label": {"focal": "FocalLoss"},
    "segmentation": {
        "dice_focal": "DiceFocalLoss",
        "generalized_dice_focal": "GeneralizedDiceFocalLoss",
        "tversky": "TverskyLoss",
    },
}
_ERRORS: dict[str, Callable[..., Tensor]] = {"l1": functional.l1_loss, "huber": functional.huber_loss}  # of regression


def named_loss(kind: str, name: str, args: Mapping[str, Any], builtin: Any) -> Loss:
    """The loss of a name in `config.task.LOSSES`.

    Args:
        kind: kind of the task.
        name: name of the loss.
        args: further keyword arguments of the library's loss, such as `gamma`.
        builtin: the built-in objective of the kind.

    Raises:
        ConfigError: the library's loss does not take these arguments, or MONAI is not installed.
    """
    if fixed := [key for key in ("reduction", "to_onehot_y", "softmax", "sigmoid", "use_softmax") if key in args]:
        raise ConfigError(f"task.loss_args: {fixed[0]} cannot be set: it follows from the task")
    try:
        loss = _made(kind, name, args, builtin)
        loss(*_example(kind, builtin))
    except ImportError as error:
        raise ConfigError(f"task.loss = {name!r} needs the package monai: pip install monai") from error
    except Exception as error:
        raise ConfigError(f"task.loss_args: {name} does not take them: {type(error).__name__}: {line_of(error)}") from error
    return loss


def _made(kind: str, name: str, args: Mapping[str, Any], builtin: Any) -> Loss:
    if isinstance(builtin, Regression):
        error, standardised = _ERRORS[name], builtin.standardised
        return lambda outputs, labels: error(outputs.squeeze(-1), standardised(labels), reduction="none", **args)
    import monai.losses

    make = getattr(monai.losses, _MONAI[kind][name])
    if kind == "segmentation":
        return _of_patches(make(to_onehot_y=True, softmax=True, **args))
    if kind == "multi_label":
        return _of_findings(make(reduction="none", **args))
    return _of_classes(make(use_softmax=True, reduction="none", **args))


def _example(kind: str, builtin: Any) -> tuple[Tensor, Tensor]:
    """Outputs and labels of two examples, to try a loss on."""
    number = builtin.num_outputs
    if kind == "segmentation":
        return torch.zeros(2, number, 4, 4), torch.zeros(2, 1, 4, 4, dtype=torch.int64)
    labels = {"multi_label": torch.zeros(2, number), "regression": torch.ones(2)}
    return torch.zeros(2, number), labels.get(kind, torch.zeros(2, dtype=torch.int64))


def _of_classes(loss: Loss) -> Loss:
    """Sums over classes; labels are indices [size], or shares [size, classes]."""

    def losses(outputs: Tensor, labels: Tensor) -> Tensor:
        shares = labels if labels.ndim == 2 else functional.one_hot(labels, outputs.shape[1])
        return loss(outputs, shares.to(outputs.dtype)).sum(-1)

    return losses


def _of_findings(loss: Loss) -> Loss:
    """Averages over findings, those that are unknown (NaN) counting as 0."""

    def losses(outputs: Tensor, labels: Tensor) -> Tensor:
        return (loss(outputs, labels.nan_to_num()) * ~labels.isnan()).sum(-1) / outputs.shape[1]

    return losses


def _of_patches(loss: Loss) -> Loss:
    """Of each patch alone, so that an example counts the same in every batch."""

    def losses(outputs: Tensor, labels: Tensor) -> Tensor:
        if not len(outputs):
            return outputs.flatten(1).sum(1)  # [0], with a gradient, for a rank without examples
        pairs = zip(outputs.unsqueeze(1), labels.unsqueeze(1), strict=True)
        return torch.stack([loss(logits, mask) for logits, mask in pairs])

    return losses
