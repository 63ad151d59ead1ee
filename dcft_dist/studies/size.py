"""How much a study has to compute: counted from its arms, seeds and data, before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..config.schema import Config
from ..data.tasks import load_task
from ..train.places import places
from .study import Cell, Study, final_cells, load_study, make_config, tuning_cells


def size_of(file: Path, folder: Path, overrides: Sequence[str] = ()) -> str:
    """Counts cells, trainings, and the examples that a model is trained and evaluated on, as a Markdown table.

    Cells that differ in the interpolation alone share a training. A training counts as three forwards of each example. For
    the tested cells, each arm counts with the first of its values.

    Args:
        file: the study's TOML file.
        folder: the study's folder; it need not exist.
        overrides: see `load_study`.

    Raises:
        ConfigError: the study is wrong.
        DataError: the data cannot be read.
    """
    study = load_study(file, overrides)
    first = {(setting, arm): study.grid(arm)[0] for setting in study.settings for arm in study.arms}
    phases = {"tuning": list(tuning_cells(study)), "testing": list(final_cells(study, first))}
    lines = ["| phase | cells | trainings | examples trained on | examples evaluated | forwards |", "|---" * 6 + "|"]
    total = [0] * 5
    for phase, cells in phases.items():
        row = [len(cells), *_counts(study, cells, folder)]
        total = [a + b for a, b in zip(total, row, strict=True)]
        lines.append(f"| {phase} | {' | '.join(f'{n:,}' for n in row)} |")
    hours = total[-1] / 3600
    return "\n".join(
        [
            *lines,
            f"| all | {' | '.join(f'{n:,}' for n in total)} |",
            "",
            f"At 1,000 forwards a second (a GPU) {hours / 1000:.3g} hours, at 10 (a processor) {hours / 10:.3g}, besides "
            "heads and scores. Your own rate: `dcft train` with `--train.max_steps 50`.",
        ]
    )


def _counts(study: Study, cells: Iterable[Cell], folder: Path) -> tuple[int, int, int, int]:
    """Trainings, examples trained on, examples evaluated, forwards."""
    trainings: dict[str, tuple[Config, bool]] = {}
    for cell in cells:
        config = make_config(study, cell, folder)
        key = config.name if study.interpolates else cell.name
        before = trainings.get(key, (config, False))[1]
        trainings[key] = config, before or study.family(cell.arm) is not None
    sizes: dict[str, tuple[int, int, int]] = {}
    trained = evaluated = forwards = 0
    for config, interpolates in trainings.values():
        key = config.task.model_dump_json() + config.data.model_dump_json()
        if key not in sizes:
            task = load_task(config)
            sizes[key] = len(task.train), len(task.validation), sum(len(s) for s in (task.test, *task.external.values()))
        train, validation, test = sizes[key]
        epochs = 0 if config.method == "linear_probe" else config.train.epochs
        families = 3 if interpolates else 0
        looks = validation * (epochs + 1 + (len(places()) if interpolates else 0)) + test * config.test * (1 + families)
        trained, evaluated = trained + train * epochs, evaluated + looks
        forwards += 3 * train * epochs + looks
    return len(trainings), trained, evaluated, forwards
