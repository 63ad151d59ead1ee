"""A trial before training with `data.packing`: the model must keep the texts of a row apart."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.packing import packed
from ..engines.find import find_engine
from ..errors import ConfigError
from ..models.pretrained import takes_names
from .context import RunContext

_TOKENS = 8


@torch.no_grad()
def try_packing(run: RunContext) -> None:
    """Runs the model on two pairs of texts, then with another first text in each pair. Collective.

    Args:
        run: the context of the run.

    Raises:
        ConfigError: the second text gets other outputs, or the model takes no positions.
    """
    model, module = run.model, run.pretrained.module
    if not takes_names(module, {"input_ids": None, "position_ids": None}):
        raise ConfigError(f"data.packing: {type(module).__name__} has no argument position_ids: leave out data.packing")
    text: list[int] = run.train.inputs([0])["input_ids"][0].tolist()
    text, first = (text * _TOKENS)[:_TOKENS], text[0]
    other = next((token for token in text if token != first), max(first - 1, 0))
    training = model.training
    model.eval()
    outputs = [_of_second(run, [begin] * _TOKENS, text) for begin in (first, other)]
    model.train(training)
    find_engine(model).settle()
    if not torch.equal(*outputs):
        raise ConfigError(
            f"data.packing: in {type(module).__name__} a text changes the outputs of the next text in its row: leave out "
            "data.packing, or choose another attention (model.args.attn_implementation)"
        )


def _of_second(run: RunContext, first: list[int], second: list[int]) -> Tensor:
    """Outputs for the second text of each pair, [2, tokens, vocabulary]."""
    width = None if run.config.packs_one_row else 2 * _TOKENS
    batch = packed([first, second] * 2, [1] * 4, width, pad_id=0)
    with run.prepared.computing():
        found = run.outputs(run.model, {name: value.to(run.world.device) for name, value in batch.items()})
    return found.reshape(4, _TOKENS, -1)[1::2]
