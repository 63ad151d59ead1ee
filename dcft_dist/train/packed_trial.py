"""A trial before training with `data.packing`: the model must keep the texts of a row apart, and begin to count anew."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.packing import packed
from ..engines.find import find_engine
from ..errors import ConfigError
from ..models.pretrained import takes_names
from .context import RunContext

_TOKENS = 8
_CLOSE = 0.02  # difference of outputs that rounding to bfloat16 may make, relative to the largest one


@torch.no_grad()
def try_packing(run: RunContext) -> None:
    """Runs the model on two pairs of texts, then with another first text in each pair, then on the second text alone.

    Collective.

    Args:
        run: the context of the run.

    Raises:
        ConfigError: the second text gets other outputs each time, or the model takes no positions.
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
    alone = _alone(run, text)
    model.train(training)
    find_engine(model).settle()
    if not bool(alone.isfinite().all()):
        return  # of weights that are no numbers; the run says so itself
    if float((outputs[0] - alone).abs().max()) > _CLOSE * float(alone.abs().max()):
        raise ConfigError(
            f"data.packing: {type(module).__name__} gives a text other outputs behind another one in its row than alone "
            "(positions that go on, or texts that are not kept apart): leave out data.packing"
        )
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


def _alone(run: RunContext, text: list[int]) -> Tensor:
    """Outputs for the same text in two rows of its own, [2, tokens, vocabulary]."""
    ids = torch.tensor([text, text], device=run.world.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with run.prepared.computing():
        return run.outputs(run.model, batch)
