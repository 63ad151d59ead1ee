"""The end of a run: the weights of the best epoch are tested, once, and exported; the summary is written."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from . import collectives
from .checkpoint import load_checkpoint, read_state
from .files import read_json, table_of, write_atomic, write_json
from .fundamental import FundamentalSet
from .job import Job
from .methods import merge_adapters
from .objective import Metrics, intervals
from .penalty import Penalty
from .provenance import machine, peak_memory_gib, versions, weights_checksum
from .weights import save_weights


def finish(
    job: Job, fundamental: FundamentalSet | None, best: Path, penalty: Penalty | None, commit: str | None
) -> dict[str, Any]:
    """Returns the summary, which is also in `summary.json`. Collective.

    Args:
        best: checkpoint of the best epoch.
        commit: of the code that the run began with.
    """
    config, directory = job.config, job.directory
    directory.phase("test")
    state = read_state(best)
    load_checkpoint(best, job.model)
    test, spread = _test(job) if config.test else (None, None)
    if config.checkpoint.keep_last:
        _export(job, fundamental)
    directory.phase("done", int(best.name.removeprefix("best_")))
    extra = fundamental.info.extra if fundamental else {}
    summary = {
        "name": config.name,
        "method": config.method,
        "engine": config.engine,
        "ranks": job.world.world_size,
        "device": job.world.device.type,
        "seed": config.seed,
        "criterion": fundamental.info.criterion if fundamental else None,
        "fraction": fundamental.fraction if fundamental else None,
        "num_selected": fundamental.num_selected if fundamental else None,
        "num_eligible": fundamental.num_eligible if fundamental else None,
        "num_weights": job.num_weights,
        "factor": penalty.factor if penalty else None,
        "level": penalty.level if penalty else None,
        "where": penalty.where if penalty and penalty.level == "gradient" else None,
        "optimizer": config.optimizer.name,
        "best_epoch": state["epoch"],
        "jaccard_with_top": extra.get("jaccard_with_top"),
        "loading": job.pretrained.loading.report.to_json() if job.pretrained.loading else None,
        "validation": state["validation"],
        "test": test,
        "test_intervals": spread,
        "labels": job.facts,
        "splits": {
            name: [len(split), len(set(split.groups))]
            for name, split in (("train", job.task.train), ("validation", job.task.validation), ("test", job.task.test))
        },
        "seconds": directory.seconds,
        "peak_memory_gib": peak_memory_gib(job.world.device),
        "versions": versions(),
        "machine": machine(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "git_commit": commit,
        "data_checksum": job.task.checksum,
        "weights_checksum": weights_checksum(job.model),
        "caveat": job.task.caveat,
        "removal": read_json(directory.removal) if directory.removal.exists() else None,
    }
    if job.world.is_first:
        write_json(directory.summary, summary)
    return summary


def _test(job: Job) -> tuple[Metrics, dict[str, list[float]] | None]:
    """Metrics on the test data, with intervals; the prediction for each example goes into a file."""
    found = job.evaluate(job.test)
    labels = [job.test.labels[i] for i in found.indices]
    groups = [job.task.test.groups[i] for i in found.indices]
    spread = intervals(job.objective, found.records, torch.tensor(labels), groups, job.config.test_resamples)
    columns = {"group": groups, "label": labels, **job.objective.predictions(found.records, job.task.class_names)}
    with collectives.agreed("write the predictions"):
        if job.world.is_first:
            write_atomic(job.directory.predictions, table_of(columns))
    return found.metrics, spread


def _export(job: Job, fundamental: FundamentalSet | None) -> None:
    """The adapted model as a folder that its own library reads; its head, if that was put on; the fundamental set."""
    folder = job.directory.model
    if job.config.method == "lora":
        merge_adapters(job.pretrained.module)
    for prefix, part in job.pretrained.parts.items():
        save_weights(job.model, folder / part.folder, prefix=prefix, stem=part.stem)
    if fundamental is not None:
        fundamental.save(folder / job.directory.fundamental.name)
    with collectives.agreed("export"):
        if job.world.is_first:
            job.pretrained.describe(folder)
            job.pretrained.processor.save(folder)
