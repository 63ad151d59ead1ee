"""Draws splits and folds from the user's data: groups stay whole, and each class or finding is in each part by its share.

Without the second, a small class may have one test example or none, and its numbers say nothing.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

from ..errors import DataError
from .readers import Row

Classes = Callable[[Row], Sequence[str]]  # the classes or positive findings of a row; none: the split is by group alone


def draw_splits(rows: Sequence[Row], shares: Mapping[str, float], classes: Classes, seed: int) -> dict[str, list[Row]]:
    """Divides examples into training data and other splits.

    One group after another, class by class, goes to the split that lacks most examples. So each split has its share of each
    class, up to a group. The first group of a class is for training, since a class without training examples is an error.

    Args:
        rows: the examples.
        shares: share of the examples in each split beside `train`.
        classes: see `Classes`. A group counts for its rarest class.
        seed: of the order of the groups.

    Returns:
        Rows by split, `train` among them, in the order of `rows`. A split with a share has a group, if there are enough.
    """
    size = Counter(row.group for row in rows)
    wanted = {**shares, "train": 1 - sum(shares.values())}  # in a tie the first wins
    lacking, split_of = dict.fromkeys(wanted, 0.0), dict[str, str]()
    spare: list[tuple[bool, int, str]] = []  # groups for training; the last ones can be missed most easily
    for groups in _by_class(rows, classes, random.Random(f"{seed}:groups")):
        for i, group in enumerate(groups):
            for name, share in wanted.items():
                lacking[name] += share * size[group]
            split_of[group] = max(lacking, key=lacking.__getitem__) if i else "train"
            lacking[split_of[group]] -= size[group]
            if split_of[group] == "train":
                spare.append((i == 0, size[group], group))
    spare.sort(reverse=True)
    for name, share in shares.items():
        if share and len(spare) > 1 and name not in split_of.values():
            split_of[spare.pop()[-1]] = name
    return {name: [row for row in rows if split_of[row.group] == name] for name in wanted}


def draw_fold(rows: Sequence[Row], folds: int, fold: int, classes: Classes, seed: int) -> dict[str, list[Row]]:
    """Divides examples into `folds` parts of about one size, of which one validates.

    Args:
        rows: the examples.
        folds: number of parts.
        fold: the part that validates, from 0.
        classes: as in `draw_splits`.
        seed: as in `draw_splits`.

    Returns:
        Rows of `train` and of `validation`, in the order of `rows`.

    Raises:
        DataError: there are fewer groups than folds.
    """
    size = Counter(row.group for row in rows)
    if len(size) < folds:
        raise DataError(f"data.folds is {folds}, but training and validation data have only {len(size)} groups")
    filled, fold_of = [0] * folds, dict[str, int]()
    for groups in _by_class(rows, classes, random.Random(f"{seed}:folds")):
        of_class = [0] * folds
        for group in sorted(groups, key=lambda group: -size[group]):
            chosen = min(range(folds), key=lambda i: (of_class[i], filled[i]))
            fold_of[group] = chosen
            of_class[chosen] += size[group]
            filled[chosen] += size[group]
    parts: dict[str, list[Row]] = {"train": [], "validation": []}
    for row in rows:
        parts["validation" if fold_of[row.group] == fold else "train"].append(row)
    return parts


def _by_class(rows: Sequence[Row], classes: Classes, draw: random.Random) -> list[list[str]]:
    """The groups of each class in random order, the most frequent class first. A group counts for its rarest class."""
    frequency = Counter(name for row in rows for name in classes(row))
    rarest: dict[str, tuple[int, str]] = {}
    for row in rows:
        named = [(frequency[name], name) for name in classes(row)]
        rarest[row.group] = min([*named, rarest.get(row.group, (len(rows) + 1, ""))])
    groups = sorted(rarest)
    draw.shuffle(groups)
    groups.sort(key=rarest.__getitem__, reverse=True)  # keeps the random order within a class
    return [list(of_class) for _, of_class in groupby(groups, key=rarest.__getitem__)]
