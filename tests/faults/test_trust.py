"""What comes from others: folders of runs, files of data, links, tables."""

from __future__ import annotations

import json
import os
import pickle
import pty
import shutil
import stat
from pathlib import Path
from typing import Any

import monai.data
import numpy as np
import pytest

from dcft_dist.cli import main
from dcft_dist.config.toml import load_config
from dcft_dist.config.trust import named_code, remember, require_trust
from dcft_dist.data.monai_readers import loader
from dcft_dist.errors import ConfigError, RunError, TrustError
from dcft_dist.files import append_line, table_of
from dcft_dist.imports import find_function, find_object
from dcft_dist.runs.lock import locked

from ..processes import dcft
from ..ranks import context
from ..train.test_run import encoder, tiny, train

__all__ = ["encoder", "tiny"]


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))


# -- code --------------------------------------------------------------------------------------------------------------

CODE = """import pathlib
pathlib.Path(__file__).with_name('it_ran').touch()
def loss(outputs, labels):
    return outputs.sum(-1) * 0
"""


@pytest.fixture
def foreign(tiny: Path, tmp_path: Path) -> Path:
    """A finished run whose folder brings code, and was trained by somebody else."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/their_code.py").write_text(CODE)
    own = ["--task.loss", "their_code.loss", "--import_roots", json.dumps([str(tmp_path / "theirs")])]
    train(tiny, tmp_path, "--engine", "single", "--train.epochs", "1", "--removal.fractions", "[]", *own, ranks=1)
    shutil.rmtree(tmp_path / "state")
    (tmp_path / "theirs/it_ran").unlink()
    return tmp_path / "tiny"


def test_a_strangers_run_runs_nothing(foreign: Path, tmp_path: Path) -> None:
    ran = tmp_path / "theirs/it_ran"
    for command in (
        ["evaluate", foreign],
        ["predict", foreign],
        ["inspect", foreign / "config.toml"],
        ["delta", foreign, "x"],
    ):
        done = dcft(*command)
        said = done.stderr
        assert done.returncode == 2
        assert "names code that would run: " in said and "task.loss = their_code.loss" in said and "--trust-code" in said
        assert not ran.exists(), command
    assert main(["status", str(foreign)]) == main(["report", str(foreign)]) == main(["verify", str(foreign)]) == 0
    assert not ran.exists()
    assert dcft("evaluate", foreign, "--trust-code").returncode == 0 and ran.exists()
    assert dcft("evaluate", foreign).returncode == 0, "the word was given"
    (tmp_path / "theirs/their_code.py").write_text(CODE + "\n")
    assert dcft("evaluate", foreign).returncode == 2, "not for other code"


def test_ones_own_training_is_ones_word(tiny: Path, tmp_path: Path) -> None:
    """The record is outside of the run's folder, so a folder cannot bring it along."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/my_code.py").write_text(CODE)
    own = ["--task.loss", "my_code.loss", "--import_roots", json.dumps([str(tmp_path / "mine")])]
    train(tiny, tmp_path, "--engine", "single", "--train.epochs", "1", "--removal.fractions", "[]", *own, ranks=1)
    assert dcft("evaluate", tmp_path / "tiny").returncode == 0
    record = tmp_path / "state/dcft_dist/code.jsonl"
    assert record.exists() and not list((tmp_path / "tiny").rglob("code.jsonl"))


def test_what_is_typed_needs_no_further_word(tmp_path: Path) -> None:
    words = [
        "--task.loss",
        "somewhere.loss",
        "--import_roots",
        "['x']",
        "--data.build=other.rows",
        "--data.format",
        "python",
    ]
    config = load_config("icd.toml", words)
    require_trust(config, "a run", typed=words)
    with pytest.raises(TrustError, match=r"task\.loss = somewhere\.loss\. Read"):
        require_trust(config, "a run", typed=words[2:])
    require_trust(config, "a run", given=True)
    require_trust(config, "a run")
    remember(load_config("icd.toml", ["--task.metrics", "['somewhere.metric']"]))
    require_trust(
        load_config("icd.toml", ["--task.metrics", "['somewhere.metric']", "--task.loss", "somewhere.loss"]), "a run"
    )


def test_settings_of_the_user(tmp_path: Path) -> None:
    config = load_config("icd.toml", ["--task.loss", "somewhere.loss"])
    with pytest.raises(TrustError, match=r"task\.loss = somewhere\.loss"):
        require_trust(config, "a run")
    (tmp_path / "settings/dcft_dist").mkdir(parents=True)
    settings = tmp_path / "settings/dcft_dist/trusted.toml"
    settings.write_text('callables = ["somewhere.*"]')
    require_trust(config, "a run")
    theirs = load_config("icd.toml", ["--task.loss", "somewhere.loss", "--import_roots", json.dumps([str(tmp_path)])])
    with pytest.raises(TrustError, match="import_roots"):  # another module of that name
        require_trust(theirs, "a run")
    sly = load_config("icd.toml", ["--import_roots", json.dumps([str(tmp_path / "theirs somewhere.loss")])])
    with pytest.raises(TrustError, match="import_roots"):  # a folder with the name of a function
        require_trust(sly, "a run")
    settings.write_text(f'callables = ["somewhere.*"]\nroots = ["{tmp_path}"]')
    require_trust(theirs, "a run")
    settings.write_text('callables = "somewhere.*"')
    with pytest.raises(ConfigError, match="it has two lists"):
        require_trust(config, "a run")


def test_nobody_is_asked_but_a_person(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("icd.toml", ["--task.loss", "somewhere.loss"])
    ours, theirs = pty.openpty()
    os.write(ours, b"y\ny\n")
    with open(theirs, "r+b", buffering=0) as terminal:
        import io
        import sys

        text = io.TextIOWrapper(io.FileIO(os.dup(terminal.fileno()), "r"), write_through=False)
        monkeypatch.setattr(sys, "stdin", text)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        require_trust(config, "a run")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(TrustError):
            require_trust(config, "a run")
    os.close(ours)


@pytest.mark.parametrize(
    ("words", "needs"),
    [
        (["--model.build", "timm.create_model", "--model.args", '{model_name = "resnet18"}'], False),
        (["--model.build", "timm.create_model", "--model.args", '{checkpoint_path = "x.pth"}'], True),
        (["--model.build", "transformers.AutoModel", "--model.weights", "x"], False),
        (["--model.build", "transformers.AutoModel", "--model.args", "{trust_remote_code = true}"], True),
        (["--model.build", "monai.networks.nets.UNet", "--model.args", '{act = "object:torch.nn.SiLU"}'], False),
        (["--model.build", "monai.networks.nets.UNet", "--model.args", '{act = ["object:evil.Act"]}'], True),
        (["--model.build", "monai.bundle.load"], True),
        (["--model.build", "monai.networks.nets.swin_unetr.torch.os.system", "--model.args", '{command = "x"}'], True),
        (["--model.build", "monai.networks.nets.swin_unetr.torch.hub.load"], True),
        (["--model.build", "transformers.AutoModel.from_pretrained", "--model.args", "{weights_only = false}"], True),
        (["--model.build", "transformers.AutoModel", "--model.args", "{weights_only = false}"], True),
        (["--model.build", "timm.create_model", "--model.args", '{model_name = "hf-hub:theirs/model"}'], True),
        (
            [
                "--model.build",
                "timm.create_model",
                "--model.args",
                '{model_name = "vit_base_patch16_224.mae", pretrained = true}',
            ],
            True,
        ),
        (
            [
                "--model.build",
                "timm.create_model",
                "--model.args",
                '{model_name = "vit_base_patch16_224.mae", drop_path_rate = 0.1}',
            ],
            False,
        ),
        (
            ["--model.build", "monai.networks.nets.UNet", "--model.args", '{num_classes = "num_outputs", decoder_num = 3}'],
            False,
        ),
        (["--task.loss", "torch.nn.functional.importlib.import_module"], True),
        (["--task.loss", "torch.nn.functional.cross_entropy"], False),
        (["--data.modality", "image", "--data.path", "x", "--data.transform", "monai.transforms.RandFlip"], False),
        (["--data.modality", "image", "--data.path", "x", "--data.transform", "monai.transforms.LoadImage"], True),
        (
            ["--data.modality", "image", "--data.path", "x", "--data.transform", "monai.transforms.inverse.torch.os.system"],
            True,
        ),
        (["--engine", "theirs:Engine"], True),
        (["--import_roots", '["."]'], True),
        (["--task.metrics", '["theirs.metric"]'], True),
    ],
)
def test_what_needs_a_word(words: list[str], needs: bool) -> None:
    assert bool(named_code(load_config("icd.toml", words))) == needs


def test_a_record_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "state").write_text("no folder")
    remember(load_config("icd.toml", ["--task.loss", "somewhere.loss"]))
    assert "predictions will ask for --trust-code" in caplog.text


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As in some containers: no variable, and no entry in the list of users."""
    import pwd

    def nobody(_: int) -> Any:
        raise KeyError("no such user")

    for name in ("HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    config = load_config("icd.toml", ["--task.loss", "somewhere.loss"])
    remember(config)
    assert "the record of code cannot be written" in caplog.text
    with pytest.raises(TrustError):
        require_trust(config, "a run")


def test_the_source_is_the_one_that_python_takes(tmp_path: Path) -> None:
    """A package goes before a module of the same name."""
    (tmp_path / "both").mkdir()
    (tmp_path / "both/__init__.py").write_text("x = 1\n")
    (tmp_path / "both.py").write_text("x = 2\n")
    words = ["--task.loss", "both.x", "--import_roots", json.dumps([str(tmp_path)])]
    assert "both/__init__.py" in named_code(load_config("icd.toml", words))["task.loss = both.x"]


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("model.build", "os.system"),
        ("task.loss", "builtins.eval"),
        ("data.build", "subprocess:Popen"),
        ("engine", "pdb:Pdb"),
    ],
)
def test_what_can_never_be_meant(key: str, path: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: {path} belongs to Python itself, and is none of what may stand here: "):
        find_object(path, [], key)


def test_a_module_of_ones_own_may_have_any_name(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("def loss():\n    return 1\n")
    import sys

    sys.modules.pop("code", None)
    assert find_function("code.loss", [str(tmp_path)], "task.loss")() == 1
    sys.modules.pop("code", None)
    sys.path.remove(str(tmp_path.resolve()))


# -- pickles -----------------------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def as_monai_150(monkeypatch: pytest.MonkeyPatch) -> None:
    """MONAI 1.5.0, which pyproject allows, unpickles."""

    def read(self: Any, data: Any, **_: Any) -> Any:
        return np.load(data if isinstance(data, str | Path) else data[0], allow_pickle=True)

    monkeypatch.setattr(monai.data.NumpyReader, "read", read)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_volumes_with_pickles(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_monai_150(monkeypatch)
    file, ran = tmp_path / f"volume{suffix}", tmp_path / "it_ran"
    array = np.array([Evil(ran)], dtype=object)
    np.savez(file, array) if suffix == ".npz" else np.save(file, array, allow_pickle=True)
    assert b"pathlib" in file.read_bytes()
    with pytest.raises(Exception, match=r"allow_pickle=False|Object arrays"):
        loader("image", lambda image: image)({"image": str(file)})
    assert not ran.exists()


def test_weights_with_pickles(tmp_path: Path) -> None:
    from dcft_dist.errors import CheckpointError
    from dcft_dist.weights.weight_files import WeightFiles

    (tmp_path / "model.pth").write_bytes(pickle.dumps({"weight": Evil(tmp_path / "it_ran")}))
    with pytest.raises(CheckpointError, match="cannot be read without running code in it"):
        WeightFiles(tmp_path / "model.pth")
    assert not (tmp_path / "it_ran").exists()


# -- links, tables, rights, words --------------------------------------------------------------------------------------


def test_links_in_place_of_files(tmp_path: Path) -> None:
    """A lock or a log that leads to somebody's file: neither is written to."""
    victim = tmp_path / "precious"
    victim.write_text("keep me")
    run = tmp_path / "run"
    run.mkdir()
    (run / "lock").symlink_to(victim)
    with (
        pytest.raises(RunError, match="lock is a symbolic link, which the lock of a run may not be: delete it"),
        locked(run, 1),
    ):
        pass
    (run / "attempts.jsonl").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"):
        append_line(run / "attempts.jsonl", {"a": 1})
    assert victim.read_text() == "keep me"


def test_cells_that_a_spreadsheet_would_run() -> None:
    text = table_of(
        {"group": ["=cmd|' /C calc'!A0", "+1+1", "-3.5", "@x", "\tx", "plain", "-x"], "value": [-1.5, 1, 2, 3, 4, 5, 6]}
    )
    cells = [line.split(",")[0] for line in text.splitlines()[1:]]
    assert cells == ["'=cmd|' /C calc'!A0", "'+1+1", "-3.5", "'@x", "'\tx", "plain", "'-x"] and ",-1.5\n" in text


def test_a_private_run(tiny: Path, tmp_path: Path) -> None:
    train(
        tiny,
        tmp_path,
        "--engine",
        "single",
        "--train.epochs",
        "1",
        "--removal.fractions",
        "[]",
        "--private",
        "true",
        ranks=1,
    )
    files = [tmp_path / "tiny", *(tmp_path / "tiny").rglob("*")]
    assert len(files) > 20 and all(stat.S_IMODE(file.stat().st_mode) & 0o077 == 0 for file in files)


def by_library(config: str, folder: str) -> list[str]:
    """A training without the command line, as submitit starts it. Returns the modes of what can be read by others."""
    from dcft_dist.train.run import train as run

    run(load_config(config, ["--runs_dir", folder, "--private", "true", "--until", "select", "--removal.fractions", "[]"]))
    files = Path(folder).rglob("*")
    return [
        f"{file.name} {stat.S_IMODE(file.stat().st_mode):o}" for file in files if stat.S_IMODE(file.stat().st_mode) & 0o077
    ]


def test_a_private_run_through_submitit(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir(mode=0o755)
    with context.Pool(1) as pool:  # not a fork: torch's threads do not outlive one
        assert pool.apply(by_library, (str(tiny), str(tmp_path / "runs"))) == []


def test_patients_stand_where_the_list_says(tmp_path: Path) -> None:
    """Names of patients, in paths, groups and texts: in no file of a run but those that docs/security.md lists."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for label in ("healthy", "ill"):
        for i in range(16):
            file = tmp_path / f"pictures/{label}/Mustermann-{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(file)
    root = Path(__file__).parents[2]
    words = ["--data.modality", "image", "--data.format", "image_folder", "--data.path", tmp_path / "pictures"]
    words += ["--data.group_pattern", "([A-Za-z]+-[0-9]+)", "--import_roots", f'["{root}"]', "--engine", "single"]
    words += ["--model.build", "tests.train.test_handshake.Net", "--model.args", '{num_outputs = "num_outputs"}']
    words += ["--model.image_size", "8", "--runs_dir", tmp_path / "runs", "--name", "run", "--train.global_batch", "8"]
    words += [
        "--importance.num_samples",
        "8",
        "--importance.score_batch",
        "8",
        "--removal.fractions",
        "[]",
        "--train.epochs",
        "1",
    ]
    done = dcft("train", "smoke.toml", *words)
    assert done.returncode == 0, done.stderr
    assert "Mustermann" not in done.stdout + done.stderr
    run = tmp_path / "runs/run"
    found = {f.relative_to(run).as_posix() for f in run.rglob("*") if f.is_file() and b"Mustermann" in f.read_bytes()}
    assert found == {"predictions.csv"}


def test_an_error_of_the_users_function_does_not_quote_the_input(tmp_path: Path) -> None:
    from dcft_dist.data.collate import CollateProcessor
    from dcft_dist.errors import DataError

    (tmp_path / "failing_collate.py").write_text("def collate(inputs):\n    raise ValueError(f'bad: {inputs}')\n")
    words = [
        "--data.modality",
        "own",
        "--data.collate",
        "failing_collate.collate",
        "--data.format",
        "python",
        "--data.build",
        "a.b",
    ]
    config = load_config("icd.toml", [*words, "--import_roots", json.dumps([str(tmp_path)])])
    with pytest.raises(DataError) as caught:
        CollateProcessor(config).batch(["Mrs Mustermann, born 1950"], "draw")
    assert "Mustermann" not in str(caught.value) and "ValueError at failing_collate.py, line 2" in str(caught.value)
    import sys

    sys.path.remove(str(tmp_path.resolve()))
