"""What a run would do to each weight of a model, before anyone spends a GPU hour: `dcft inspect`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from ..config.schema import Config
from ..engines.names import ParameterNames, matrix_names
from ..models.pretrained import Pretrained

GROUPS = ("eligible", "unscored", "head", "frozen")


@dataclass(frozen=True)
class WeightRow:
    """Weights of the same name but for numbers, and of the same shape and group."""

    name: str
    shape: tuple[int, ...]
    group: str
    number: int

    @property
    def num_weights(self) -> int:
        return self.number * prod(self.shape)


def groups_of(pretrained: Pretrained, eligible: Sequence[str] | None) -> dict[str, str]:
    """Name of each weight -> `eligible` (may become fundamental), `unscored`, `head` or `frozen`.

    Raises:
        PatternError: a pattern matches nothing.
    """
    names, head = ParameterNames.of(pretrained.module), set(pretrained.head_names)
    scored = set(names.match(eligible, what="eligible") if eligible else matrix_names(pretrained.module, names))
    found = {}
    for name, parameter in names.parameters.items():
        trained = "head" if name in head else "eligible" if name in scored else "unscored"
        found[name] = trained if parameter.requires_grad else "frozen"
    return found


def lines_of(pretrained: Pretrained, eligible: Sequence[str] | None) -> list[WeightRow]:
    """One line for weights that are alike, in the order of the model."""
    parameters = ParameterNames.of(pretrained.module).parameters
    numbers: dict[tuple[str, tuple[int, ...], str], list[tuple[str, ...]]] = defaultdict(list)
    for name, group in groups_of(pretrained, eligible).items():
        key = (re.sub(r"(?<![^.])\d+(?![^.])", "*", name), tuple(parameters[name].shape), group)
        numbers[key].append(tuple(re.findall(r"(?<![^.])\d+(?![^.])", name)))
    return [WeightRow(_filled(name, found), shape, group, len(found)) for (name, shape, group), found in numbers.items()]


def _filled(name: str, numbers: Sequence[tuple[str, ...]]) -> str:
    """With the numbers that there are in the place of each star: `0-11`, or `0,2` where there are gaps."""
    for values in zip(*numbers, strict=True):
        wanted = sorted(set(map(int, values)))
        whole = wanted == list(range(wanted[0], wanted[-1] + 1))
        text = f"{wanted[0]}-{wanted[-1]}" if whole and len(wanted) > 2 else ",".join(map(str, wanted))
        name = name.replace("*", text if len(wanted) == 1 else f"[{text}]", 1)
    return name


def inspection(pretrained: Pretrained, config: Config) -> str:
    """Weights by name, shape and group; totals; units of sharding; what became of the file's tensors."""
    lines = lines_of(pretrained, config.importance.eligible)
    width = max(len(line.name) for line in lines)
    rows = [f"{_plain(line):>24}  {line.group:<9} {line.name:<{width}}" for line in lines]
    total = sum(line.num_weights for line in lines)
    sums = {group: sum(line.num_weights for line in lines if line.group == group) for group in GROUPS}
    parts = [f"{group} {number:,} ({number / total:.1%})" for group, number in sums.items() if number]
    wrapped = [f"{len(pretrained.blocks)} blocks of {kinds} are sharded one by one" for kinds in [_kinds(pretrained.blocks)]]
    loaded = [f"{config.model.weights}: {pretrained.loading.report}"] if pretrained.loading else []
    return "\n".join([*rows, "", f"{total:,} weights: {'; '.join(parts)}", *wrapped, *loaded])


def _plain(line: WeightRow) -> str:
    shape = "x".join(map(str, line.shape)) or "1"
    return f"{line.number} x {shape}" if line.number > 1 else shape


def _kinds(blocks: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(type(block).__name__ for block in blocks)) or "no kind"
