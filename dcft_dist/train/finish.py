"""The end of a run: tests the weights of the best epoch once, exports them, and writes the summary."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..data.splits import READING
from ..distributed import collectives
from ..engines.whole_tensors import weights_checksum
from ..files import read_json, write_json
from ..method.fundamental_set import FundamentalSet
from ..method.penalty import Penalty
from ..runs.facts import changes_since_begin
from ..runs.provenance import machine, peak_memory_gib, versions
from ..weights.checkpoint import read_state
from ..weights.model_state import load_checkpoint
from .adapters import merge_adapters, save_adapters
from .batch_norm import renew_statistics
from .calibrate import calibrate
from .context import RunContext
from .testing import run_tests


def finish(
    run: RunContext,
    fundamental: FundamentalSet | None,
    best: Path,
    penalty: Penalty | None,
    commit: str | None,
    loss: str = "",
) -> dict[str, Any]:
    """Tests and exports the best epoch, and writes `summary.json`. Collective.

    Args:
        run: the context of the run.
        fundamental: the run's fundamental set, if the method uses one.
        best: folder of the checkpoint of the best epoch.
        penalty: the attached penalty, if the method uses one.
        commit: git commit of the code that the run began with; None if unknown.
        loss: what was lost with a damaged checkpoint; empty if nothing was.

    Returns:
        The summary, as in `summary.json`.
    """
    config, writer = run.config, run.writer
    writer.phase("test")
    state = _load(run, best)
    tested = run_tests(run, writer.path)
    if config.checkpoint.keep_last:
        _export(run, fundamental)
    writer.phase("done", int(best.name.partition("_")[2]))
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
        "optimizer": config.optimizer.kind,
        "ema": config.train.ema,
        "temperature": state.get("temperature"),
        "best_epoch": state["epoch"],
        "metric": run.metric,  # it has chosen that epoch
        "jaccard_with_top": fundamental.info.extra.get("jaccard_with_top") if fundamental else None,
        "loading": run.pretrained.loading.report.to_json() if run.pretrained.loading else None,
        "validation": state["validation"],
        "test": tested.get("test"),
        "test_intervals": tested.get("test_intervals"),
        "external": tested.get("external", {}),
        "labels": run.facts,
        "splits": {name: [len(split), len(set(split.groups))] for name, split in run.task.splits.items()},
        "seconds": writer.seconds,
        "peak_memory_gib": peak_memory_gib(run.world.device),
        "versions": versions(),
        "machine": machine(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "git_commit": commit,
        "changes": [*changes_since_begin(writer.facts), *([loss] if loss else [])],
        "data_checksum": run.task.checksum,
        "reading": READING,
        "weights_checksum": weights_checksum(run.model),
        "caveat": run.task.caveat,
        "removal": read_json(writer.removal) if writer.removal.exists() else None,
    }
    with collectives.agreed("write the summary"):
        if run.world.is_first:
            write_json(writer.summary, summary | {"files": writer.checksums()})
    return summary


def _load(run: RunContext, best: Path) -> dict[str, Any]:
    """Reads the weights of the best epoch, or their averages, and calibrates them; returns what is known of that epoch."""
    state = read_state(best, verified=True)
    load_checkpoint(best, run.model, frozen=run.stores_frozen, averaged=True)
    if run.config.train.ema and not best.name.startswith("best"):  # a checkpoint stands in, with buffers of the weights
        renew_statistics(run)
    if run.config.train.calibrate:
        state["temperature"], state["validation"] = calibrate(run)
    return state


def _export(run: RunContext, fundamental: FundamentalSet | None) -> None:
    """Writes the adapted model as a folder that its library reads, with its new head and the fundamental set."""
    folder = run.writer.model
    if run.config.has_adapters:
        save_adapters(run.model, run.pretrained, run.config.lora, folder)
        merge_adapters(run.model, run.pretrained.module)
    run.pretrained.save(run.model, folder)
    if fundamental is not None:
        fundamental.save(folder / run.writer.fundamental.name)
    with collectives.agreed("export"):
        if run.world.is_first:
            (folder / "README.md").unlink(missing_ok=True)  # the card of an earlier export
            run.pretrained.save_description(folder)
