"""Draws splits and folds from the user's data: groups stay whole, and each class or finding is in each part by its share.

Without the second, a small class may have one test example or none, and its numbers say nothing.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

from ..errors import DataError
from .readers import Row

_TRIES, _MANY = 20, 10_000  # orders that are tried; groups from which on one order is even enough

Classes = Callable[[Row], Sequence[str]]  # the classes or positive findings of a row; none: the split is by group alone


def draw_splits(rows: Sequence[Row], shares: Mapping[str, float], classes: Classes, seed: int) -> dict[str, list[Row]]:
    """Divides examples into training data and other splits.

    Classes come in turn, the rarest first. Each of their groups goes to the split that lacks most examples of the class, as
    in the iterative stratification of Sechidis et al. (2011), which divides examples instead of groups. Of several random
    orders of the groups the most even one is taken: a few large groups may not fit the shares otherwise.

    Args:
        rows: the examples.
        shares: share of the examples in each split beside `train`.
        classes: see `Classes`.
        seed: of the order of the groups.

    Returns:
        Rows by split, `train` among them, in the order of `rows`. A split with a share has a group, if there are two more.
    """
    found, draw = _Groups(rows, classes), random.Random(f"{seed}:groups")
    wanted = {**shares, "train": 1 - sum(shares.values())}  # in a tie the first wins
    tries = [_divided(found, wanted, draw) for _ in range(_TRIES if len(found.counts) < _MANY else 1)]
    split_of = min(tries, key=lambda tried: found.unevenness(tried, wanted))
    return {name: [row for row in rows if split_of[row.group] == name] for name in wanted}


def _divided(found: _Groups, wanted: Mapping[str, float], draw: random.Random) -> dict[str, str]:
    """Split by group, for one random order of the groups."""
    lacking = {name: {c: share * n for c, n in found.frequency.items()} for name, share in wanted.items()}
    in_all = {name: share * found.frequency.total() for name, share in wanted.items()}
    split_of: dict[str, str] = {}
    spare: list[tuple[bool, int, str]] = []  # groups for training; the last ones can be missed most easily
    for of_class, groups in found.in_turn(draw):
        for i, group in enumerate(groups):
            split = max(wanted, key=lambda name: (lacking[name][of_class], in_all[name]))
            split_of[group] = split
            for name, number in found.counts[group].items():
                lacking[split][name] -= number
            size = found.counts[group].total()
            in_all[split] -= size
            if split == "train":
                spare.append((i == 0, size, group))
    spare.sort(reverse=True)
    for name, share in wanted.items():
        if share and len(spare) > 1 and name not in split_of.values():
            split_of[spare.pop()[-1]] = name
    return split_of


def draw_fold(rows: Sequence[Row], folds: int, fold: int, classes: Classes, seed: int) -> dict[str, list[Row]]:
    """Divides examples into `folds` parts of about one size, of which one validates.

    Args:
        rows: the examples.
        folds: number of parts.
        fold: the part that validates, from 0.
        classes: see `Classes`.
        seed: of the order of the groups.

    Returns:
        Rows of `train` and of `validation`, in the order of `rows`.

    Raises:
        DataError: there are fewer groups than folds.
    """
    found = _Groups(rows, classes)
    if len(found.counts) < folds:
        raise DataError(f"data.folds is {folds}, but training and validation data have only {len(found.counts)} groups")
    filled, fold_of = [Counter[str]() for _ in range(folds)], dict[str, int]()
    for of_class, groups in found.in_turn(random.Random(f"{seed}:folds")):
        for group in sorted(groups, key=lambda group: -found.counts[group].total()):
            chosen = min(range(folds), key=lambda i: (filled[i][of_class], filled[i].total()))
            fold_of[group] = chosen
            filled[chosen].update(found.counts[group])
    parts: dict[str, list[Row]] = {"train": [], "validation": []}
    for row in rows:
        parts["validation" if fold_of[row.group] == fold else "train"].append(row)
    return parts


class _Groups:
    """How often each class is in each group, and in all. A row without a class counts for the class without a name."""

    def __init__(self, rows: Sequence[Row], classes: Classes) -> None:
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.frequency = Counter[str]()
        for row in rows:
            found = classes(row) or ("",)
            self.counts[row.group].update(found)
            self.frequency.update(found)

    def unevenness(self, split_of: Mapping[str, str], wanted: Mapping[str, float]) -> float:
        """How far the shares of the classes are from those wanted: the sum of squares over splits and classes."""
        shares: dict[tuple[str, str], float] = defaultdict(float)
        for group, counts in self.counts.items():
            for name, number in counts.items():
                shares[split_of[group], name] += number / self.frequency[name]
        return sum((shares[split, name] - share) ** 2 for split, share in wanted.items() for name in self.frequency)

    def in_turn(self, draw: random.Random) -> list[tuple[str, list[str]]]:
        """Each class with the groups of which it is the rarest, in random order; the rarest class first."""
        rarest = {group: min(found, key=lambda c: (self.frequency[c], c)) for group, found in self.counts.items()}
        groups = sorted(rarest)
        draw.shuffle(groups)
        groups.sort(key=lambda group: (self.frequency[rarest[group]], rarest[group]))  # keeps the order within a class
        return [(of_class, list(found)) for of_class, found in groupby(groups, key=rarest.__getitem__)]
