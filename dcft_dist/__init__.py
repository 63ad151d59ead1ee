"""Divide-and-conquer fine-tuning (DCFT) for sharded training: score, select, penalise.

scores = score_importance(model, batches, loss_fn, head="classifier")
fundamental = select_fundamental(scores, fraction=0.10)
penalty = attach_penalty(model, fundamental, factor=0.1, optimizer=optimizer)
fundamental.save("fundamental.safetensors")
"""

from .errors import DcftError
from .fundamental import FundamentalSet
from .importance import Scores, score_importance
from .penalty import Penalty, attach_penalty
from .selection import select_fundamental
from .warmup import WarmUp, warm_up_head
from .weights import load_weights, save_weights

__version__ = "0.1.0"
__all__ = [
    "DcftError",
    "FundamentalSet",
    "Penalty",
    "Scores",
    "WarmUp",
    "attach_penalty",
    "load_weights",
    "save_weights",
    "score_importance",
    "select_fundamental",
    "warm_up_head",
]
