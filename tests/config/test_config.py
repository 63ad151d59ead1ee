"""Configuration: files, overrides, and every error at once with its path and what would be right."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from dcft_dist.config.checks import check_ranks, fitted
from dcft_dist.config.toml import differences, find_config, load_config, to_toml
from dcft_dist.config.trust import named_code
from dcft_dist.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configurations_are_valid_and_round_trip(path: Path, tmp_path: Path) -> None:
    loaded = load_config(path)
    (tmp_path / "again.toml").write_text(to_toml(loaded))
    assert load_config(tmp_path / "again.toml") == loaded
    assert load_config(path.name) == loaded  # found by name as well
    assert not named_code(loaded)  # `dcft plan` reads it without a further word


def test_overrides() -> None:
    loaded = load_config(
        "icd.toml",
        [
            "--optimizer.lr",
            "1e-5",
            "--name=x",
            "--removal.fractions",
            "[]",
            "--train.clip_grad_norm=1",
            "--train.clip_order",
            "before_penalty",
        ],
    )
    assert (loaded.optimizer.lr, loaded.name, loaded.removal.fractions, loaded.train.clip_grad_norm) == (1e-5, "x", [], 1.0)


def test_extends(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('name = "base"\n[optimizer]\nlr = 0.5\nname = "sgd"\n')
    (tmp_path / "top.toml").write_text('extends = "base.toml"\nname = "top"\n[optimizer]\nlr = 0.25\n')
    loaded = load_config(tmp_path / "top.toml")
    assert (loaded.name, loaded.optimizer.name, loaded.optimizer.lr) == ("top", "sgd", 0.25)


def test_files_that_extend_each_other(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('extends = "b.toml"')
    (tmp_path / "b.toml").write_text('extends = "a.toml"')
    with pytest.raises(ConfigError, match=r"extends itself through a.toml"):
        load_config(tmp_path / "a.toml")


def message(text: str, tmp_path: Path, overrides: Any = ()) -> str:
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "bad.toml", overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_all_errors_at_once(tmp_path: Path) -> None:
    text = 'name = "a"\nmehtod = "dcft"\n[selection]\nfraction = 1.5\n[penalty]\nfactr = 0.1\nlevel = "gradiant"\n'
    text += "[train]\nepochs = -1\n"
    found = message(text, tmp_path, ["--optimizer.name", "adam", "--seed", "x"])
    for part in (
        "mehtod: unknown key (did you mean 'method'?)",
        "selection.fraction: Input should be less than or equal to 1 (got 1.5)",
        "penalty.factr: unknown key (did you mean 'factor'?)",
        "penalty.level: Input should be 'auto', 'gradient' or 'update' (did you mean 'gradient'?) (got 'gradiant')",
        "train.epochs: Input should be greater than or equal to 0 (got -1)",
        "optimizer.name: Input should be 'adamw', 'sgd' or 'own' (did you mean 'adamw'?)",
        "seed: Input should be a valid integer",
    ):
        assert part in found, part


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "name: Field required"),
        ("name = ", "not a TOML file"),
        ('name = "../up"', "name: String should match pattern"),
        ('name = "a"\n[penalty]\nfactor = nan', "penalty.factor: Input should be a finite number"),
        ('name = "a"\n[train]\nclip_grad_norm = 1.0', "go together"),
        ('name = "a"\n[train]\nclip_grad_norm = 1.0\nclip_order = "after_penalty"', "no meaning at the update level"),
        (
            'name = "a"\n[optimizer]\nname = "sgd"\n[train]\nclip_grad_norm = 1.0\nclip_order = "before_penalty"',
            "needs penalty.where = 'after'",
        ),
        ('name = "a"\nengine = "ddp"\n[sharding]\nreplicas = 2', "replicas is for the engines fsdp2 and fsdp1"),
        ('name = "a"\nengine = "ddp"\n[sharding]\noffload = true', "needs an engine that shards"),
        (
            'name = "a"\nengine = "deepspeed"\n[penalty]\nlevel = "gradient"\nwhere = "after"\n'
            '[train]\nclip_grad_norm = 1.0\nclip_order = "after_penalty"',
            "DeepSpeed clips inside its step",
        ),
        ('name = "a"\nlr = 1e-4', "lr: unknown key (did you mean 'head_warmup.lr' or 'optimizer.lr'?)"),
        ('extends = "bad.toml"\nname = "a"', "extends itself"),
        (
            'name = "a"\n[importance]\nafter_epochs = 2\nrounds = 2',
            "the criterion 'fisher' does not rank zero weights last",
        ),
        ('name = "a"\nseed = -1', "seed: Input should be greater than or equal to 0"),
        ('extends = "none.toml"\nname = "a"', "no configuration file"),
    ],
)
def test_bad_files(text: str, part: str, tmp_path: Path) -> None:
    assert part in message(text, tmp_path)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["optimizer.lr", "1"], "an override looks like"),
        (["--optimizer.lr"], "--optimizer.lr has no value"),
        (["--optimizer.lr", "--seed"], "--optimizer.lr has no value"),
        (["--name.x", "1"], "name is not a section"),
        (["--selection.fraction", "atuo"], "Input should be 'auto' (did you mean 'auto'?)"),
        (["--optimzer.lr", "1"], "optimzer: unknown key (did you mean 'optimizer'?)"),
    ],
)
def test_bad_overrides(overrides: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=part.replace("?", r"\?").replace("(", r"\(").replace(")", r"\)")):
        load_config("icd.toml", overrides)


def test_missing_file_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'icd.toml'"):
        find_config("idc.toml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configurations_run_on_many_ranks(path: Path) -> None:
    for ranks in (1, 2, 4, 8):
        check_ranks(load_config(path), ranks)
    with pytest.raises(ConfigError, match=r"train.global_batch \d+ is not a multiple of 3 ranks: use \d+"):
        check_ranks(load_config(path), 3)


def test_default_sizes_fit_the_data() -> None:
    """Those that somebody has chosen do not change."""
    config, lines = fitted(load_config("icd.toml"), 20, 2)
    assert (config.train.global_batch, config.importance.score_batch, config.importance.num_samples) == (16, 16, 16)
    assert lines[0] == "train.global_batch 16, since there are only 20 training examples" and len(lines) == 3
    config, lines = fitted(load_config("icd.toml"), 128, 2)
    assert (config.train.global_batch, config.importance.num_samples) == (32, 128)
    assert lines == ["importance.num_samples 128, since there are only 128 training examples"]
    same, lines = fitted(load_config("icd.toml"), 2000, 2)
    assert same == load_config("icd.toml") and not lines
    chosen = load_config("icd.toml", ["--importance.num_samples", "64"])
    with pytest.raises(ConfigError, match=r"importance.num_samples is 64, but there are only 50 training examples"):
        fitted(chosen, 50, 1)
    full, lines = fitted(load_config("icd.toml", ["--importance.num_samples", "64", "--method", "full"]), 50, 1)
    assert full.importance.num_samples == 32 and not lines  # for an interpolation afterwards
    with pytest.raises(ConfigError, match="only 3 training examples for 4 ranks"):
        fitted(load_config("icd.toml"), 3, 4)


def test_resolved_level() -> None:
    assert load_config("icd.toml").level == "update"
    assert load_config("icd_sgd.toml").level == "gradient"
    assert load_config("icd.toml", ["--optimizer.name", "sgd", "--optimizer.weight_decay", "0.1"]).level == "update"
    assert tomllib.loads(to_toml(load_config("icd.toml")))["penalty"]["level"] == "auto"


def test_a_key_that_came_later_does_not_make_another_run() -> None:
    """A run that was begun by an older version goes on, unless the new key has another value than its default."""
    text = to_toml(load_config("icd.toml"))
    older = "".join(line for line in text.splitlines(True) if not line.startswith(("layer_decay", "workers")))
    assert older.count("\n") == text.count("\n") - 2
    assert differences(older, text) == {} == differences(text, older)
    now = to_toml(load_config("icd.toml", ["--optimizer.layer_decay", "0.5"]))
    assert list(differences(older, now)) == ["optimizer.layer_decay"]


def test_data_that_are_given_are_used() -> None:
    """They mean the user's own task, or an error: never the packaged data in their place."""
    words = ["--model.build", "json.loads", "--data.modality", "text"]
    for key in ("path", "train"):
        assert load_config("icd.toml", [*words, f"--data.{key}", "x.csv"]).task.name == "own"
    built = ["--data.format", "python", "--data.build", "json:loads"]
    assert load_config("icd.toml", [*words, *built]).task.name == "own"
    assert load_config("icd.toml", []).task.name == "icd10cm_chapter"
    with pytest.raises(ConfigError, match=r"task.name = 'icd10cm_chapter' has data of its own, and \[data\] names others"):
        load_config("icd.toml", [*words, "--data.path", "x.csv", "--task.name", "icd10cm_chapter"])
    with pytest.raises(ConfigError, match=r"task.name = 'mri_region' has data of its own"):
        load_config("mri.toml", ["--data.path", "x.csv"])
