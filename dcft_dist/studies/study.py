"""A study's TOML file, and the runs (cells) that it asks for: arms x seeds x settings of one task.

name = "icd_630"
base = "icd.toml"                  # the configuration that every cell starts from
tune_seeds = [1000, 1001]          # these runs choose each arm's values on validation data; they are never tested
seeds = [0, 1, 2, 3]               # these runs use the chosen values and are tested, once
[settings.icd_630]                 # task and number of training examples
task.train_per_class = 30
[arms.full]
method = "full"
optimizer.lr = [5e-5, 1e-4]        # a list of values to choose from
[arms.full_selected]
method = "full"
interpolate = "selected"           # the same run, then moved back by sets (`dcft interpolate`)
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from ..config.schema import Config
from ..config.section import Section, Seed
from ..config.toml import as_toml, flat_keys, load_config
from ..errors import ConfigError, line_of
from ..train.places import FAMILIES, can_interpolate

Values = tuple[tuple[str, Any], ...]  # dotted key, value


# Sections that determine the warmed-up head and the scores. Cells that agree in all of them share both.
_PREPARED = {"model", "task", "data", "import_roots", "seed", "head_warmup", "importance"}


# Keys that `make_config` sets.
_OWN: tuple[str, ...] = (
    "name",
    "runs_dir",
    "seed",
    "test",
    "engine",
    "checkpoint.keep_last",
    "removal.fractions",
    "test_resamples",
)
_OWN += ("train.fall_back",)

_INTERPOLATE = "interpolate"  # the one key of an arm that is not of the configuration


class Contrast(Section):
    """A difference between two arms: `arm` minus `minus`. The deciding contrast is fixed before the runs."""

    arm: str
    minus: str
    deciding: bool = False


class Study(Section):
    """A study as its TOML file describes it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=100)
    base: str
    tune_seeds: list[Seed]
    seeds: list[Seed] = Field([], description="Seeds of the tested cells. Empty: the study only tunes, on validation data.")
    resample: bool = Field(False, description="Each seed also draws its own training texts.")
    folds: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="Cross-validation: seed s validates with fold s modulo this number (`data.folds`, for your own data).",
    )
    common: dict[str, Any] = Field({}, description="Configuration keys that every cell has.")
    overrides: list[str] = Field(
        [], description="The same, as words of the command line: those that `dcft compare` was given beside the study."
    )
    settings: dict[str, dict[str, Any]] = Field(min_length=1)
    arms: dict[str, dict[str, Any]] = Field(min_length=1)
    contrasts: list[Contrast] = Field([])

    @model_validator(mode="after")
    def _fits_together(self) -> Study:
        in_both = set(self.tune_seeds) & set(self.seeds)
        if in_both:
            raise ValueError(
                f"seeds {sorted(in_both)} are in tune_seeds and in seeds: a seed that chooses values must not test them"
            )
        unknown = {arm for c in self.contrasts for arm in (c.arm, c.minus)} - self.arms.keys()
        if unknown:
            raise ValueError(f"contrasts name unknown arms: {', '.join(sorted(unknown))}")
        if sum(c.deciding for c in self.contrasts) > 1:
            raise ValueError("only one contrast can be the deciding one")
        wrong = {arm: family for arm in self.arms if (family := self.family(arm)) not in (None, *FAMILIES)}
        if wrong:
            raise ValueError(f"arms: interpolate is one of {', '.join(FAMILIES)}: {wrong}")
        if self.folds and sorted(s % self.folds for s in self.seeds) != sorted(
            [*range(self.folds)] * (len(self.seeds) // self.folds)
        ):
            raise ValueError(
                f"seeds do not have each of the {self.folds} folds equally often: seed s has fold s modulo folds"
            )
        of_cells = {**flat_keys(self.common), **{k: 0 for keys in self.settings.values() for k in flat_keys(keys)}}
        of_cells |= {key: 0 for arm in self.arms for key in self.keys(arm)}
        if self.folds and (found := sorted({"data.fold", "data.folds"} & of_cells.keys())):
            raise ValueError(f"{', '.join(found)} would have no effect: folds of the study sets them")
        if not self.tune_seeds and not self.seeds:
            raise ValueError("neither tune_seeds nor seeds are set: a study needs at least one of them")
        if not self.tune_seeds and any(self.grid(arm)[1:] for arm in self.arms):
            raise ValueError("an arm has values to choose from, but there are no tune_seeds")
        return self

    def family(self, arm: str) -> str | None:
        """The family of places that an arm interpolates in after its training; None if it does not."""
        family: str | None = self.arms[arm].get(_INTERPOLATE)
        return family

    @property
    def interpolates(self) -> bool:
        """Whether an arm interpolates."""
        return any(self.family(arm) is not None for arm in self.arms)

    def is_private(self) -> bool:
        """Whether a run of it is private."""
        seed = (self.seeds or self.tune_seeds)[0]
        cells = (Cell(setting, arm, self.grid(arm)[0], seed, False) for setting in self.settings for arm in self.arms)
        return any(make_config(self, cell, Path()).private for cell in cells)

    def keys(self, arm: str) -> dict[str, Any]:
        """The configuration keys of an arm, dotted."""
        return flat_keys({key: value for key, value in self.arms[arm].items() if key != _INTERPOLATE})

    def grid(self, arm: str) -> list[Values]:
        """All combinations of an arm's tuned values, in the order of the file.

        An arm that tunes nothing has one empty combination.
        """
        tuned = {key: value for key, value in self.keys(arm).items() if isinstance(value, list)}
        return [tuple(zip(tuned, values, strict=True)) for values in itertools.product(*tuned.values())]


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        setting: name of its setting.
        arm: name of its arm.
        values: the tuned configuration keys of the arm with this cell's values.
        seed: of the run.
        tuning: True for a run that is only validated, never tested.
    """

    setting: str
    arm: str
    values: Values
    seed: int
    tuning: bool

    @property
    def name(self) -> str:
        """The cell's name in files and logs, such as `small.full.lr-0.0001.seed-10`."""
        words = [f"{key.rpartition('.')[2]}-{value:g}" if isinstance(value, float) else f"{key.rpartition('.')[2]}-{value}"
                 for key, value in self.values]  # fmt: skip
        return ".".join([self.setting, self.arm, *words, f"seed-{self.seed}"])


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Reads a study and checks the configurations of its cells.

    Args:
        path: its TOML file.
        overrides: keys and values that every cell has, such as `["--data.path", "pathmnist.npz"]`; they replace those of the
            study's `common`, and give way to those of settings and arms.

    Raises:
        ConfigError: the file does not exist, its keys are wrong, a cell has a wrong configuration, or an override would have
            no effect.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        if "arms" not in raw:
            raise ConfigError(
                f"{path} is a run, not a study: use dcft train {path}. To compare methods on it: dcft init "
                f"{path.stem}_study.toml --study {path}"
            )
        study = Study.model_validate(raw)
        if overrides:
            study = study.model_copy(update={"overrides": list(overrides)})
    except OSError as error:
        raise ConfigError(f"no study {path}: {error.strerror}") from error
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        raise ConfigError(f"{path}: " + "; ".join(text.removeprefix(": ") for text in problems)) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a TOML file: {line_of(error)}") from error
    _check_overrides(study)
    for setting in study.settings:
        for arm in study.arms:
            for values in study.grid(arm):
                cell = Cell(setting, arm, values, (study.seeds or study.tune_seeds)[0], False)
                _check_cell(study, cell, make_config(study, cell, Path()))
    return study


def _check_overrides(study: Study) -> None:
    """Checks that overrides are not overridden themselves."""
    given = {word[2:].partition("=")[0] for word in study.overrides if word.startswith("--")}
    taken = {
        **dict.fromkeys(_OWN, "the study itself"),
        **({"task.sample_seed": "the study itself"} if study.resample else {}),
        **({"data.folds": "the study itself", "data.fold": "the study itself"} if study.folds else {}),
    }
    for setting, keys in study.settings.items():
        taken |= dict.fromkeys(flat_keys(keys), f"settings.{setting}")
    for arm in study.arms:
        taken |= dict.fromkeys(study.keys(arm), f"arms.{arm}")
    for key in sorted(given & taken.keys()):
        raise ConfigError(f"--{key} has no effect: {taken[key]} sets it")


def _check_cell(study: Study, cell: Cell, config: Config) -> None:
    """Checks what a run alone would find out after its training."""
    if config.task.kind != "single_label":
        raise ConfigError(f"a study compares accuracies, so its task.kind is 'single_label', not {config.task.kind!r}")
    if study.family(cell.arm) and not can_interpolate(config):
        raise ConfigError(
            f"arms.{cell.arm}: interpolate goes with method full, dcft or equal_displacement, scored at the start"
        )


def tuning_cells(study: Study) -> Iterator[Cell]:
    """The tuning cells of every arm that has values to choose from.

    The order is seed by seed, so that all arms progress together. A study without seeds to test has only tuning cells, and
    then every arm has them.
    """
    for setting, seed, arm in itertools.product(study.settings, study.tune_seeds, study.arms):
        if len(study.grid(arm)) > 1 or not study.seeds:
            yield from (Cell(setting, arm, values, seed, True) for values in study.grid(arm))


def final_cells(study: Study, chosen: dict[tuple[str, str], Values]) -> Iterator[Cell]:
    """The cells that are tested.

    Args:
        study: the study.
        chosen: the values chosen for each (setting, arm).
    """
    for setting, seed, arm in itertools.product(study.settings, study.seeds, study.arms):
        yield Cell(setting, arm, chosen[setting, arm], seed, False)


def make_config(study: Study, cell: Cell, folder: Path) -> Config:
    """The configuration of a cell's run, with its run directory in `folder`/runs until the cell is done.

    In a study that interpolates, cells with the same training have the same run.

    Args:
        study: the study.
        cell: one of its cells.
        folder: the study's folder.
    """
    given = _words(flat_keys(study.common))
    overrides = flat_keys(study.settings[cell.setting])
    overrides |= {key: value for key, value in study.keys(cell.arm).items() if not isinstance(value, list)}
    overrides |= dict(cell.values) | {"name": cell.name, "runs_dir": str(folder / "runs"), "seed": cell.seed}
    overrides |= {"test": not cell.tuning, "engine": "single", "checkpoint.keep_last": 0, "removal.fractions": []}
    overrides["test_resamples"] = 0  # the study computes intervals over all its seeds
    if not cell.tuning:  # test the fine-tuned model: two arms that both fell back on the linear probe could not differ
        overrides["train.fall_back"] = False
    if study.resample:
        overrides["task.sample_seed"] = cell.seed
    if study.folds:
        overrides |= {"data.folds": study.folds, "data.fold": cell.seed % study.folds}
    if study.interpolates:  # every cell's model moves, so it is exported, and has left epoch 0
        overrides |= {"checkpoint.keep_last": 1, "train.fall_back": False}
    arguments = _words(overrides)
    config = load_config(study.base, [*given, *study.overrides, *arguments])
    return config.model_copy(update={"name": _digest(settings_of(config))}) if study.interpolates else config


def _words(keys: dict[str, Any]) -> list[str]:
    """Keys and values as words of the command line."""
    return [word for key, value in keys.items() for word in (f"--{key}", as_toml(value))]


def make_preparation(config: Config, folder: Path) -> Config:
    """The configuration of the run that computes the head and the scores for a cell.

    Its name is a digest of everything that determines head and scores. Cells with the same name therefore share them.

    Args:
        config: of the cell.
        folder: the study's folder; the run is in `folder`/prepared.
    """
    facts = {key: value for key, value in config.model_dump().items() if key in _PREPARED}
    facts["precision"] = config.train.precision
    training = {"train": config.train, "optimizer": config.optimizer, "selection": config.selection}
    if config.importance.after_epochs:
        facts["before scoring"] = {key: value.model_dump() for key, value in training.items()}
    digest = _digest(facts)
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
            **(training if config.importance.after_epochs else {}),
        }
    )


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def settings_of(config: Config) -> dict[str, Any]:
    """The keys of a cell's configuration that can change its numbers, with their values."""
    without_effect = ("name", "runs_dir", "start_from", "timeout_s", "log_every", "max_attempts", "test_resamples")
    return {key: value for key, value in flat_keys(config.model_dump()).items() if key not in without_effect}
