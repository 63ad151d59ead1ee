"""A study: arms x seeds x settings of one task, from a TOML file to the runs (cells) that it asks for.

name = "icd_630"
base = "icd.toml"                  # what every cell starts from
tune_seeds = [1000, 1001]          # choose each arm's values on validation data; their test data are never touched
seeds = [0, 1, 2, 3]               # run once with the values chosen, and tested
[settings.icd_630]                 # task and size
task.train_per_class = 30
[arms.full]
method = "full"
optimizer.lr = [5e-5, 1e-4]        # a list: tuned
[[contrasts]]
arm = "dcft"
minus = "random_magnitude"
deciding = true
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from ..config.schema import Config
from ..config.section import Section, Seed
from ..config.toml import flat_keys, load_config
from ..errors import ConfigError

Values = tuple[tuple[str, Any], ...]  # dotted key, value


# Sections that decide about the head and the scores: cells that agree in them share both.
_PREPARED = {"model", "task", "data", "import_roots", "seed", "head_warmup", "importance"}


class Contrast(Section):
    """A difference between two arms; the deciding one is fixed before the runs."""

    arm: str
    minus: str
    deciding: bool = False


class Study(Section):
    """A study as its file says it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    base: str
    tune_seeds: list[Seed]
    seeds: list[Seed] = Field([], description="Of the cells that are tested; none: only tuning, on validation data.")
    resample: bool = Field(False, description="Each seed also draws its own training texts.")
    common: dict[str, Any] = Field({}, description="Keys of every cell.")
    settings: dict[str, dict[str, Any]] = Field(min_length=1)
    arms: dict[str, dict[str, Any]] = Field(min_length=1)
    contrasts: list[Contrast] = Field([])

    @model_validator(mode="after")
    def _fits_together(self) -> Study:
        both = set(self.tune_seeds) & set(self.seeds)
        if both:
            raise ValueError(
                f"seeds {sorted(both)} are in tune_seeds and in seeds: what was chosen on a seed is not tested on it"
            )
        unknown = {arm for c in self.contrasts for arm in (c.arm, c.minus)} - self.arms.keys()
        if unknown:
            raise ValueError(f"contrasts name arms that are not there: {', '.join(sorted(unknown))}")
        if sum(c.deciding for c in self.contrasts) > 1:
            raise ValueError("only one contrast can be the deciding one")
        if not self.tune_seeds and not self.seeds:
            raise ValueError("there are neither tune_seeds nor seeds")
        if not self.tune_seeds and any(self.grid(arm)[1:] for arm in self.arms):
            raise ValueError("an arm has values to choose from, but there are no tune_seeds")
        return self

    def grid(self, arm: str) -> list[Values]:
        """The combinations of an arm's tuned values, in the order of the file; one empty combination if nothing is tuned."""
        tuned = {key: value for key, value in flat_keys(self.arms[arm]).items() if isinstance(value, list)}
        return [tuple(zip(tuned, values, strict=True)) for values in itertools.product(*tuned.values())]


@dataclass(frozen=True)
class Cell:
    """One run of a study; `tuning`: only validated."""

    setting: str
    arm: str
    values: Values
    seed: int
    tuning: bool

    @property
    def name(self) -> str:
        words = [f"{key.rpartition('.')[2]}-{value:g}" if isinstance(value, float) else f"{key.rpartition('.')[2]}-{value}"
                 for key, value in self.values]  # fmt: skip
        return ".".join([self.setting, self.arm, *words, f"seed-{self.seed}"])


def load_study(path: Path) -> Study:
    """
    Raises:
        ConfigError: no such file, wrong keys, or a cell whose configuration is wrong.
    """
    try:
        study = Study.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"no study {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from error
    except ValidationError as error:
        found = [f"{'.'.join(map(str, d['loc']))}: {d['msg'].removeprefix('Value error, ')}" for d in error.errors()]
        raise ConfigError(f"{path}: " + "; ".join(text.removeprefix(": ") for text in found)) from error
    for setting in study.settings:
        for arm in study.arms:
            for values in study.grid(arm):
                make_config(study, Cell(setting, arm, values, (study.seeds or study.tune_seeds)[0], False), Path())
    return study


def tuning_cells(study: Study) -> Iterator[Cell]:
    """Cells that choose values, for arms that have any to choose from; seed by seed, so that arms stay level.

    In a study without seeds to be tested these are all there is, and every arm has them.
    """
    for setting, seed, arm in itertools.product(study.settings, study.tune_seeds, study.arms):
        if len(study.grid(arm)) > 1 or not study.seeds:
            yield from (Cell(setting, arm, values, seed, True) for values in study.grid(arm))


def final_cells(study: Study, chosen: dict[tuple[str, str], Values]) -> Iterator[Cell]:
    """Cells that are tested, with the values chosen for each (setting, arm)."""
    for setting, seed, arm in itertools.product(study.settings, study.seeds, study.arms):
        yield Cell(setting, arm, chosen[setting, arm], seed, False)


def make_config(study: Study, cell: Cell, folder: Path) -> Config:
    """The configuration of a cell's run, which lives in `folder`/runs while it lasts."""
    given = flat_keys(study.common) | flat_keys(study.settings[cell.setting])
    given |= {key: value for key, value in flat_keys(study.arms[cell.arm]).items() if not isinstance(value, list)}
    given |= dict(cell.values) | {"name": cell.name, "runs_dir": str(folder / "runs"), "seed": cell.seed}
    given |= {"test": not cell.tuning, "engine": "single", "checkpoint.keep_last": 0, "removal.fractions": []}
    given["test_resamples"] = 0  # intervals are those of all seeds
    if not cell.tuning:  # what is tested has been fine-tuned: two arms that both fell back on the probe could not differ
        given["train.fall_back"] = False
    if study.resample:
        given["task.sample_seed"] = cell.seed
    words = [word for key, value in given.items() for word in (f"--{key}", json.dumps(value))]
    return load_config(study.base, words)


def make_preparation(config: Config, folder: Path) -> Config:
    """The run that makes the head and the scores which a cell starts from."""
    facts = {key: value for key, value in config.model_dump().items() if key in _PREPARED}
    facts["precision"] = config.train.precision
    trains = {"train": config.train, "optimizer": config.optimizer, "selection": config.selection}
    if config.importance.after_epochs:
        facts["before scoring"] = {key: value.model_dump() for key, value in trains.items()}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    defaults = Config(name=digest)
    return config.model_copy(
        update={
            "name": digest,
            "runs_dir": str(folder / "prepared"),
            "method": "dcft",
            "until": "score",
            "selection": defaults.selection,
            "penalty": defaults.penalty,
            "optimizer": defaults.optimizer,
            "train": defaults.train.model_copy(update={"precision": config.train.precision}),
            **(trains if config.importance.after_epochs else {}),
        }
    )


def settings_of(config: Config) -> dict[str, Any]:
    """What of a cell's configuration decides about its numbers."""
    passing = ("name", "runs_dir", "start_from", "timeout_s", "log_every", "max_attempts", "test_resamples")
    return {key: value for key, value in flat_keys(config.model_dump()).items() if key not in passing}
