"""Splits that are drawn: groups stay whole, each class is in each split by its share, and nothing is lost."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from dcft_dist.config.toml import load_config
from dcft_dist.data.draw import draw_fold, draw_splits
from dcft_dist.data.readers import Row
from dcft_dist.data.user_task import user_task
from dcft_dist.errors import DataError

from .tables import table

SHARES = {"validation": 0.15, "test": 0.2}


def label(row: Row) -> Sequence[str]:
    return [row.label] if row.label else []


def rows_of(groups: Sequence[tuple[int, str]]) -> list[Row]:
    """Rows in groups of (size, class), in random order."""
    rows = [Row(f"{g}-{i}", name, f"g{g}", "here") for g, (size, name) in enumerate(groups) for i in range(size)]
    random.Random(0).shuffle(rows)
    return rows


def counts(rows: Sequence[Row]) -> Counter[str]:
    return Counter(row.label for row in rows)


def test_a_rare_class_is_in_each_split_by_its_share() -> None:
    rows = rows_of([(1, name) for name in ["normal"] * 140 + ["benign"] * 40 + ["malignant"] * 20])
    for seed in range(20):
        parts = draw_splits(rows, SHARES, label, seed)
        for name, share in {**SHARES, "train": 0.65}.items():
            for of_class, number in counts(rows).items():
                assert abs(counts(parts[name])[of_class] - share * number) <= 1, (seed, name, of_class)
        again = draw_splits(rows[::-1], SHARES, label, seed)
        assert {n: {r.input for r in part} for n, part in parts.items()} == {
            n: {r.input for r in part} for n, part in again.items()
        }, "the order of the rows changes nothing"
    drawn = {tuple(row.input for row in draw_splits(rows, SHARES, label, seed)["test"]) for seed in range(20)}
    assert len(drawn) == 20, "each seed draws others"


@pytest.mark.parametrize("seed", range(40))
def test_any_groups(seed: int) -> None:
    draw = random.Random(seed)
    num_classes = draw.randint(0, 4)
    groups = [
        (draw.randint(1, draw.choice((1, 5, 40))), draw.choice("abcd"[:num_classes]) if num_classes else "")
        for _ in range(draw.randint(3, 60))
    ]
    rows, largest = rows_of(groups), max(size for size, _ in groups)
    parts = draw_splits(rows, SHARES, label, seed)
    assert sorted(row.input for part in parts.values() for row in part) == sorted(row.input for row in rows)
    assert all([row for row in rows if row in part] == part for part in parts.values()), "the order of the rows is kept"
    split_of = {row.group: name for name, part in parts.items() for row in part}
    assert all(split_of[row.group] == name for name, part in parts.items() for row in part), "groups stay whole"
    assert all(parts.values()), "no split is empty"
    for name, share in SHARES.items():
        assert abs(len(parts[name]) - share * len(rows)) <= (2 + max(num_classes, 1)) * largest
    if len(groups) > 2 + num_classes:
        assert set(counts(parts["train"])) == set(counts(rows)), "each class is in the training data"


def test_few_groups_of_different_sizes() -> None:
    """A rare class in five groups, which have other classes too, is in every split: the most even of several orders."""
    groups = [[*["rare"] * n, *["common"] * (10 - n)] for n in (7, 6, 4, 2, 1)] + [["common"] * 5 for _ in range(40)]
    rows = [Row(f"{g}-{i}", name, f"g{g}", "here") for g, names in enumerate(groups) for i, name in enumerate(names)]
    for seed in range(20):
        parts = draw_splits(rows, SHARES, label, seed)
        found = {name: counts(part) for name, part in parts.items()}
        assert all(abs(found[name]["rare"] - share * 20) <= 2.01 for name, share in SHARES.items()), found
        assert all(abs(found[name]["common"] - share * 230) <= 15 for name, share in SHARES.items()), found


def test_a_group_counts_for_its_rarest_class() -> None:
    """Each patient has normal pictures, and some have one of a tumour: these patients are divided by their share."""
    rows = [
        Row(f"{p}-{i}", "tumour" if i == 0 and p < 20 else "normal", f"p{p}", "here") for p in range(100) for i in range(5)
    ]
    parts = draw_splits(rows, SHARES, label, 3)
    assert counts(parts["validation"])["tumour"] == 3 and counts(parts["test"])["tumour"] == 4


def test_folds_have_their_share_of_each_class() -> None:
    rows = rows_of([(1, name) for name in ["normal"] * 80 + ["tumour"] * 15])
    parts = [draw_fold(rows, 5, fold, label, 1) for fold in range(5)]
    assert [counts(part["validation"]) for part in parts] == [{"normal": 16, "tumour": 3}] * 5
    assert sorted(row.input for part in parts for row in part["validation"]) == sorted(row.input for row in rows)


def test_findings_are_divided_too(tmp_path: Path) -> None:
    rows = [{"input": f"text {i}", "mass": int(i % 10 == 0), "fluid": int(i % 4 == 0)} for i in range(100)]
    words = [
        "--task.name",
        "own",
        "--data.modality",
        "text",
        "--task.kind",
        "multi_label",
        "--data.label",
        '["mass", "fluid"]',
    ]
    words += ["--data.path", str(table(tmp_path, rows))]
    for seed in range(10):
        task = user_task(load_config("icd.toml", [*words, "--task.split_seed", str(seed)]))
        positive = {name: [sum(column) for column in zip(*split.labels, strict=True)] for name, split in task.splits.items()}
        assert [positive[name][0] for name in ("validation", "test")] in ([1, 2], [2, 2]), positive
        assert 2 <= positive["validation"][1] <= 5 and 3 <= positive["test"][1] <= 7, positive


def test_shares_that_leave_nothing(tmp_path: Path) -> None:
    data = table(tmp_path, [{"input": f"text {i}", "label": "ab"[i % 2]} for i in range(20)])
    words = ["--task.name", "own", "--data.modality", "text", "--data.path", str(data), "--data.validation_share", "0.8"]
    with pytest.raises(DataError, match=r"nothing is left for training: data.validation_share and data.test_share are 1"):
        user_task(load_config("icd.toml", words))
