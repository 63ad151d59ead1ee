"""Divide-and-conquer fine-tuning (DCFT) for sharded training: score the weights, select a set, penalise its updates.

scores = score_importance(model, batches, loss_fn, head="classifier")
fundamental = select_fundamental(scores, fraction=0.10)
penalty = attach_penalty(model, fundamental, factor=0.1, optimizer=optimizer)
fundamental.save("fundamental.safetensors")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engines.checksum import check_replicas
    from .errors import DcftError
    from .method.fundamental_set import FundamentalSet
    from .method.head_warmup import WarmUp, warm_up_head
    from .method.importance import score_importance
    from .method.penalty import Penalty, attach_penalty
    from .method.scores import Scores, load_scores, save_scores
    from .method.selection import select_fundamental
    from .weights.export import load_weights, save_weights

__version__ = "0.1.0"
_HOME = {
    "DcftError": "errors",
    "FundamentalSet": "method.fundamental_set",
    "Penalty": "method.penalty",
    "Scores": "method.scores",
    "WarmUp": "method.head_warmup",
    "attach_penalty": "method.penalty",
    "check_replicas": "engines.checksum",
    "load_scores": "method.scores",
    "load_weights": "weights.export",
    "save_scores": "method.scores",
    "save_weights": "weights.export",
    "score_importance": "method.importance",
    "select_fundamental": "method.selection",
    "warm_up_head": "method.head_warmup",
}
__all__ = [
    "DcftError",
    "FundamentalSet",
    "Penalty",
    "Scores",
    "WarmUp",
    "attach_penalty",
    "check_replicas",
    "load_scores",
    "load_weights",
    "save_scores",
    "save_weights",
    "score_importance",
    "select_fundamental",
    "warm_up_head",
]


def __dir__() -> list[str]:
    """The public names, also those that were not used yet: notebooks complete them."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def __getattr__(name: str) -> Any:
    """Imports public names at first use, so that `dcft --help` and checks before a job need no torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
