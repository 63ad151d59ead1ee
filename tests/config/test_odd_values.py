"""Values that no file can hold as they are, and words that would write into a batch script: refused in one line."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from dcft_dist.cli import main
from dcft_dist.cluster.job import Site, load_site
from dcft_dist.config.schema import Config
from dcft_dist.config.task import Data
from dcft_dist.config.toml import differences, load_config, to_toml
from dcft_dist.data.readers import read_rows
from dcft_dist.data.tables import records
from dcft_dist.errors import CheckpointError, ConfigError, DamagedError, DataError
from dcft_dist.weights.weight_files import WeightFiles

OWN = ["--model.build", "timm.create_model"]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", '"\\u007f"', '"\\u0001"', '"\\n"', "1e400", "0.1"])
def test_what_a_file_can_hold(value: str) -> None:
    config = load_config("icd.toml", [*OWN, "--model.args", f"{{a = [{value}]}}"])
    text = to_toml(config)
    again = Config.model_validate(tomllib.loads(text))
    assert json.dumps(again.model.args) == json.dumps(config.model.args) and differences(text, to_toml(again)) == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.args", "{a = 1979-05-27}"], "1979-05-27 is a date or time: put it in quotes"),
        (["--model.args", "{a = [07:32:00]}"], "is a date or time"),
        (["--model.args", "{a = " + "[" * 30 + "]" * 30 + "}"], "nested more than 20 deep"),
        (["--model.args", "[" * 3000 + "]" * 3000], "model.args"),
        (["--model.args", "{a = " + "7" * 5000 + "}"], "model.args"),
        (["--model.args", '{a = "\\u0000"}'], "has a null character"),
        (["--penalty.factor", "true"], "true is no number"),
        (["--seed", "false"], "false is no number"),
        (["--optimizer.betas", "[0.9, true]"], "true is no number"),
        (["--train.patience", "true"], "true is no number"),
        (["--runs_dir", '"a\\u0000b"'], "has a null character"),
        (["--runs_dir", "a\udcffb"], "is no valid text"),
        (["--name", "x" * 201], "name: "),
        (["--name", '"x\\n"'], "name: "),
        ([f"--{'a.' * 30}b=1"], "a key has more than 20 parts"),
        (["--data.format", "image_folder", "--data.path", "x", "--data.group_pattern", "(["], "is no regular expression"),
    ],
)
def test_what_it_cannot_hold(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("icd.toml", [*OWN, *words])
    assert said in str(caught.value), str(caught.value)[:300]


@pytest.mark.parametrize(
    "text", ["a = " + "7" * 5000, "a = " + "[" * 3000, 'extends = "' + "x" * 5000 + '"', "name = 'x'\0", "a = 1979-13-45"]
)
def test_odd_files(text: str, tmp_path: Path) -> None:
    (tmp_path / "odd.toml").write_text(text)
    with pytest.raises(ConfigError):
        load_config(tmp_path / "odd.toml")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--time", "abc"], "'abc' is no time limit"),
        (["--time", "1:00\n#SBATCH --uid=0"], "is no time limit"),
        (["--cpus-per-task", "-5"], "--cpus-per-task is -5: give at least 1"),
        (["--ranks-per-node", "0"], "--ranks-per-node is 0: give at least 1"),
        (["--nodes", "0"], "--nodes is 0: give at least 1"),
        (["--gpus-per-node", "-1"], "--gpus-per-node is -1: give at least 0"),
    ],
)
def test_sizes_of_a_job(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "smoke.toml", "--dry-run", *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("key", ["partition", "account", "qos", "constraint", "gpu_type", "time"])
def test_a_value_of_a_site_is_one_line(key: str, tmp_path: Path) -> None:
    value = "gpu\n#SBATCH --uid=0"
    with pytest.raises(ValidationError):
        Site.model_validate({key: value})
    for listed in ("sbatch", "srun", "container"):
        with pytest.raises(ValidationError):
            Site.model_validate({listed: [value]})
    (tmp_path / "site.toml").write_text(f"{key} = {json.dumps(value)}\n")
    with pytest.raises(ConfigError, match=rf"site\.toml: {key}: "):
        load_site({"DCFT_SITE": str(tmp_path / "site.toml")})


@pytest.mark.parametrize("line", ['{"a":' * 100_000, '{"a": ' + "7" * 5000 + "}", "[" * 100_000])
def test_odd_lines_of_json(line: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(line)
    with pytest.raises(DataError, match=r"rows\.jsonl, line 1: not a JSON object"):
        list(records(tmp_path / "rows.jsonl"))


def test_arrays_that_are_numbers(tmp_path: Path) -> None:
    names = [f"{split}_{kind}" for split in ("train", "val", "test") for kind in ("images", "labels")]
    np.savez(tmp_path / "scalars.npz", **dict.fromkeys(names, np.float64(3)))
    with pytest.raises(DataError, match="is not a MedMNIST file"):
        read_rows(Data(format="medmnist", path=str(tmp_path / "scalars.npz")), ())


@pytest.mark.parametrize(
    "content", ["[]", "3", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../x"}}', "[" * 100_000]
)
def test_indices_of_odd_shapes(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises((DamagedError, CheckpointError), match=r"index\.json|cannot be read"):
        WeightFiles(tmp_path)
