"""The role and the rates of each weight in a run, shown before the run starts: `dcft inspect`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from ..config.schema import Config
from ..engines.names import ParameterNames, matrix_names
from ..models.pretrained import Pretrained
from ..train.optimizer import Rates, rates_of

GROUPS = ("eligible", "unscored", "head", "frozen")


@dataclass(frozen=True)
class WeightRow:
    """Weights of one shape and group with the same rates, and with names that differ only in numbers.

    Attributes:
        name: their common name, with the numbers as a range: `blocks.[0-11].weight`.
        shape: shape of each weight.
        group: `eligible`, `unscored`, `head` or `frozen`.
        number: how many weights there are.
        rates: their learning rate and weight decay; None where they are not asked for.
    """

    name: str
    shape: tuple[int, ...]
    group: str
    number: int
    rates: Rates | None = None

    @property
    def num_weights(self) -> int:
        """Number of scalar weights in all of them."""
        return self.number * prod(self.shape)


def groups_of(pretrained: Pretrained, eligible: Sequence[str] | None) -> dict[str, str]:
    """Group of each weight.

    Args:
        pretrained: the model with its head.
        eligible: patterns of the weights to score; None: weights of linear and convolution layers outside the head.

    Returns:
        Name -> `eligible` (may become fundamental), `unscored` (trained, but never scored), `head` or `frozen`.

    Raises:
        PatternError: a pattern matches nothing.
    """
    names, head = ParameterNames.of(pretrained.module), set(pretrained.head_names)
    scored = set(names.match(eligible, what="eligible") if eligible else matrix_names(pretrained.module, names))
    groups = {}
    for name, parameter in names.parameters.items():
        trained = "head" if name in head else "eligible" if name in scored else "unscored"
        groups[name] = trained if parameter.requires_grad else "frozen"
    return groups


def lines_of(
    pretrained: Pretrained, eligible: Sequence[str] | None, rates: Mapping[str, Rates] | None = None
) -> list[WeightRow]:
    """Summarises similar weights in rows, in the order of the model.

    Args:
        pretrained: the model with its head.
        eligible: as for `groups_of`.
        rates: name -> rates of a weight; see `rates_of`. None: rows do not tell them apart.

    Raises:
        PatternError: a pattern matches nothing.
    """
    parameters = ParameterNames.of(pretrained.module).parameters
    numbers: dict[tuple[str, tuple[int, ...], str, Rates | None], list[tuple[str, ...]]] = defaultdict(list)
    for name, group in groups_of(pretrained, eligible).items():
        own_rates = rates[name] if rates and group != "frozen" else None
        key = (re.sub(r"(?<![^.])\d+(?![^.])", "*", name), tuple(parameters[name].shape), group, own_rates)
        numbers[key].append(tuple(re.findall(r"(?<![^.])\d+(?![^.])", name)))
    return [
        WeightRow(_filled(name, rows), shape, group, len(rows), own_rates)
        for (name, shape, group, own_rates), rows in numbers.items()
    ]


def _filled(name: str, numbers: Sequence[tuple[str, ...]]) -> str:
    """Replaces each star in a name by the numbers that occur there: `[0-11]`, or `[0,2]` if there are gaps."""
    for values in zip(*numbers, strict=True):
        indices = sorted(set(map(int, values)))
        contiguous = indices == list(range(indices[0], indices[-1] + 1))
        text = f"{indices[0]}-{indices[-1]}" if contiguous and len(indices) > 2 else ",".join(map(str, indices))
        name = name.replace("*", text if len(indices) == 1 else f"[{text}]", 1)
    return name


def inspection(pretrained: Pretrained, config: Config) -> str:
    """The text of `dcft inspect`.

    Args:
        pretrained: the model with its head; what the method freezes is frozen.
        config: configuration of the run.

    Returns:
        Lines with the shape, group, learning rate, weight decay and name of the weights; totals by group; the blocks that
        are sharded one by one; and a summary of the tensors in the file of weights.

    Raises:
        PatternError: a pattern in `importance.eligible` or `optimizer.groups` matches nothing.
    """
    lines = lines_of(pretrained, config.importance.eligible, rates_of(pretrained, config))
    width = max(len(line.name) for line in lines)
    title = f"{'shape':>24}  {'group':<9} {'lr':>8} {'decay':>7}  name"
    rows = [
        title,
        *(f"{_shape_text(line):>24}  {line.group:<9} {_rates_text(line)}  {line.name:<{width}}" for line in lines),
    ]
    total = sum(line.num_weights for line in lines)
    sums = {group: sum(line.num_weights for line in lines if line.group == group) for group in GROUPS}
    parts = [f"{group} {number:,} ({number / total:.1%})" for group, number in sums.items() if number]
    blocks = f"{len(pretrained.blocks)} blocks of {_kinds(pretrained.blocks)} are sharded one by one"
    wrapped = [blocks if pretrained.blocks else "no repeated layers: a sharding engine shards the model as one block"]
    loaded = [f"{config.model.weights}: {pretrained.loading.report}"] if pretrained.loading else []
    return "\n".join([*rows, "", f"{total:,} weights: {'; '.join(parts)}", *wrapped, *loaded])


def _shape_text(line: WeightRow) -> str:
    """Number and shape of a row: `12 x 384x384`."""
    shape = "x".join(map(str, line.shape)) or "1"
    return f"{line.number} x {shape}" if line.number > 1 else shape


def _rates_text(line: WeightRow) -> str:
    """Peak learning rate and weight decay of a row."""
    return f"{'-':>8} {'-':>7}" if line.rates is None else f"{line.rates.peak_lr:>8.3g} {line.rates.weight_decay:>7.3g}"


def _kinds(blocks: Iterable[object]) -> str:
    """Names of the blocks' classes."""
    return ", ".join(dict.fromkeys(type(block).__name__ for block in blocks))
