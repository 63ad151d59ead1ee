"""The end of a run: the weights of the best epoch are tested, once, and exported; the summary is written."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..distributed import collectives
from ..engines.whole_tensors import weights_checksum
from ..files import read_json, table_of, write_atomic, write_json
from ..method.fundamental_set import FundamentalSet
from ..method.penalty import Penalty
from ..objectives.base import Metrics, intervals
from ..runs.provenance import machine, peak_memory_gib, versions
from ..weights.checkpoint import load_checkpoint, read_state
from .context import RunContext
from .methods import merge_adapters


def finish(
    run: RunContext, fundamental: FundamentalSet | None, best: Path, penalty: Penalty | None, commit: str | None
) -> dict[str, Any]:
    """Returns the summary, which is also in `summary.json`. Collective.

    Args:
        best: checkpoint of the best epoch.
        commit: of the code that the run began with.
    """
    config, directory = run.config, run.writer
    directory.phase("test")
    state = read_state(best)
    load_checkpoint(best, run.model)
    test, spread = _test(run) if config.test else (None, None)
    if config.checkpoint.keep_last:
        _export(run, fundamental)
    directory.phase("done", int(best.name.removeprefix("best_")))
    extra = fundamental.info.extra if fundamental else {}
    summary = {
        "name": config.name,
        "method": config.method,
        "engine": config.engine,
        "ranks": run.world.world_size,
        "device": run.world.device.type,
        "seed": config.seed,
        "criterion": fundamental.info.criterion if fundamental else None,
        "fraction": fundamental.fraction if fundamental else None,
        "num_selected": fundamental.num_selected if fundamental else None,
        "num_eligible": fundamental.num_eligible if fundamental else None,
        "num_weights": run.num_weights,
        "factor": penalty.factor if penalty else None,
        "level": penalty.level if penalty else None,
        "where": penalty.where if penalty and penalty.level == "gradient" else None,
        "optimizer": config.optimizer.name,
        "best_epoch": state["epoch"],
        "jaccard_with_top": extra.get("jaccard_with_top"),
        "loading": run.pretrained.loading.report.to_json() if run.pretrained.loading else None,
        "validation": state["validation"],
        "test": test,
        "test_intervals": spread,
        "labels": run.facts,
        "splits": {
            name: [len(split), len(set(split.groups))]
            for name, split in (("train", run.task.train), ("validation", run.task.validation), ("test", run.task.test))
        },
        "seconds": directory.seconds,
        "peak_memory_gib": peak_memory_gib(run.world.device),
        "versions": versions(),
        "machine": machine(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "git_commit": commit,
        "data_checksum": run.task.checksum,
        "weights_checksum": weights_checksum(run.model),
        "caveat": run.task.caveat,
        "removal": read_json(directory.removal) if directory.removal.exists() else None,
    }
    if run.world.is_first:
        write_json(directory.summary, summary)
    return summary


def _test(run: RunContext) -> tuple[Metrics, dict[str, list[float]] | None]:
    """Metrics on the test data, with intervals; the prediction for each example goes into a file."""
    found = run.evaluate(run.test)
    labels = [run.test.labels[i] for i in found.indices]
    groups = [run.task.test.groups[i] for i in found.indices]
    spread = intervals(run.objective, found.records, torch.tensor(labels), groups, run.config.test_resamples)
    columns = {"group": groups, "label": labels, **run.objective.predictions(found.records, run.task.class_names)}
    with collectives.agreed("write the predictions"):
        if run.world.is_first:
            write_atomic(run.writer.predictions, table_of(columns))
    return found.metrics, spread


def _export(run: RunContext, fundamental: FundamentalSet | None) -> None:
    """The adapted model as a folder that its own library reads; its head, if that was put on; the fundamental set."""
    folder = run.writer.model
    if run.config.method == "lora":
        merge_adapters(run.pretrained.module)
    run.pretrained.save(run.model, folder)
    if fundamental is not None:
        fundamental.save(folder / run.writer.fundamental.name)
    with collectives.agreed("export"):
        if run.world.is_first:
            run.pretrained.save_description(folder)
