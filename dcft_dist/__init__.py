"""Divide-and-conquer fine-tuning (DCFT) for sharded training: score, select, penalise.

scores = score_importance(model, batches, loss_fn, head="classifier")
fundamental = select_fundamental(scores, fraction=0.10)
penalty = attach_penalty(model, fundamental, factor=0.1, optimizer=optimizer)
fundamental.save("fundamental.safetensors")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import DcftError
    from .fundamental import FundamentalSet
    from .importance import Scores, score_importance
    from .penalty import Penalty, attach_penalty
    from .score_file import load_scores, save_scores
    from .selection import select_fundamental
    from .warmup import WarmUp, warm_up_head
    from .weights import load_weights, save_weights

__version__ = "0.1.0"
_HOME = {
    "DcftError": "errors",
    "FundamentalSet": "fundamental",
    "Penalty": "penalty",
    "Scores": "importance",
    "WarmUp": "warmup",
    "attach_penalty": "penalty",
    "load_scores": "score_file",
    "load_weights": "weights",
    "save_scores": "score_file",
    "save_weights": "weights",
    "score_importance": "importance",
    "select_fundamental": "selection",
    "warm_up_head": "warmup",
}
__all__ = [
    "DcftError",
    "FundamentalSet",
    "Penalty",
    "Scores",
    "WarmUp",
    "attach_penalty",
    "load_scores",
    "load_weights",
    "save_scores",
    "save_weights",
    "score_importance",
    "select_fundamental",
    "warm_up_head",
]


def __getattr__(name: str) -> Any:
    """Imports late: `dcft --help` and checks before a job need no torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
