"""Tests a model once on test data: metrics, 95 % intervals, and a table of predictions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from ..data.batches import Examples
from ..data.splits import Split, file_of
from ..distributed import collectives
from ..errors import DivergedError
from ..files import table_of, write_atomic
from ..objectives.base import Metrics, intervals
from .context import RunContext


def run_tests(run: RunContext, folder: Path, after: str = "") -> dict[str, Any]:
    """Tests the model as it is on the test data, and on further test data if the task has them. Collective.

    Args:
        run: the context of the run.
        folder: where the tables of predictions go.
        after: end of their names, before `.csv`.

    Returns:
        `"test"` and `"test_intervals"`, and `"external"`: name -> the same two. {} if the run is not to be tested.

    Raises:
        DivergedError: an output or a test loss is NaN, or a loss is infinite.
    """
    if not run.config.test:
        return {}
    external = {}
    for name, split in run.task.external.items():
        found = _test(run, run.external[name], split, folder / f"predictions{after}_{name}.csv")
        external[name] = dict(zip(("test", "test_intervals"), found, strict=True))
    test, test_intervals = _test(run, run.test, run.task.test, folder / f"predictions{after}.csv")
    return {"test": test, "test_intervals": test_intervals, "external": external}


def _test(run: RunContext, examples: Examples, split: Split, table: Path) -> tuple[Metrics, dict[str, list[float]] | None]:
    evaluation = run.evaluate(examples)
    evaluation.require_numbers(split, "test")
    if not math.isfinite(loss := evaluation.metrics["loss"]):
        raise DivergedError(f"the test loss is {loss}: there is an infinite number among the outputs or the labels")
    labels = [examples.labels[i] for i in evaluation.indices]
    groups = [split.groups[i] for i in evaluation.indices]
    test_intervals = intervals(run.objective, evaluation.records, torch.tensor(labels), groups, run.config.test_resamples)
    columns = {"group": groups, "label": labels, **run.objective.predictions(evaluation.records, run.task.class_names)}
    if any(files := [file_of(split.inputs[i]) for i in evaluation.indices]):  # none of texts: they stay out of the table
        columns = {"file": files, **columns}
    if run.config.task.kind == "single_label":
        columns |= {key: [run.task.class_names[int(i)] for i in columns[key]] for key in ("label", "predicted")}
    with collectives.agreed("write the predictions"):
        if run.world.is_first:
            write_atomic(table, table_of(columns))
    return evaluation.metrics, test_intervals
