"""A rank or a start that has something else is stopped, and the message names it; files are compared by their contents."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from dcft_dist.config.toml import load_config
from dcft_dist.data.contents import Contents
from dcft_dist.data.splits import Split, content_of
from dcft_dist.data.user_task import user_task
from dcft_dist.distributed.world import World
from dcft_dist.errors import DataError, DcftError
from dcft_dist.files import read_json
from dcft_dist.runs.status import run_verdict, status
from dcft_dist.train.run import run

from ..processes import dcft, output_of
from ..ranks import run_ranks

ROOT = str(Path(__file__).parents[2])


class Net(nn.Module):
    """Two layers on pictures of 8 x 8."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3 * 8 * 8, 6), nn.Linear(6, num_outputs)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.relu(self.body(pixel_values.flatten(1))))
        return out


def pictures(folder: Path, seed: int = 0) -> Path:
    """Thirty pictures of two classes, each 40 kB of noise without compression: ends and a middle."""
    rng = np.random.default_rng(seed)
    for i in range(30):
        place = folder / ["abnormal", "normal"][i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (250, 250, 3), np.uint8)).save(place / f"{i:02}.bmp")
    return folder


def weights(file: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    save_file(Net(2).state_dict(), file)
    return file


def words(folder: Path, *more: str) -> list[str]:
    own = ["--data.modality", "image", "--data.format", "image_folder", "--data.path", str(folder / "pictures")]
    own += ["--model.build", "tests.train.test_handshake.Net", "--model.args", '{num_outputs = "num_outputs"}']
    own += ["--model.weights", str(folder / "net.safetensors"), "--model.image_size", "8", "--import_roots", f'["{ROOT}"]']
    own += ["--runs_dir", str(folder / "runs"), "--engine", "ddp", "--train.epochs", "2", "--train.global_batch", "6"]
    own += ["--importance.num_samples", "12", "--importance.score_batch", "6", "--head_warmup.max_epochs", "1"]
    return [*own, "--checkpoint.every", "2", "--log_every", "1", "--test_resamples", "0", "--removal.fractions", "[]", *more]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pictures(tmp_path / "pictures")
    weights(tmp_path / "net.safetensors")
    return tmp_path


def started(folder: str, odd: list[str], extra: list[str], make: Callable[..., list[str]]) -> str:
    """How a run ends in which rank 1 has further words; "" if it ends well."""
    rank = dist.get_rank()
    try:
        config = load_config("smoke.toml", make(Path(folder), *extra, *(odd if rank == 1 else [])))
        run(config, World(rank, dist.get_world_size(), torch.device("cpu")))
    except DcftError as error:
        return re.sub(" on [^ ]+ has", " has", str(error))
    return ""


def on_two_ranks(folder: Path, *odd: str, extra: tuple[str, ...] = (), make: Callable[..., list[str]] = words) -> str:
    first, second = run_ranks(2, started, str(folder), list(odd), list(extra), make)
    assert first == second
    return first


# -- ranks of one start --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        (["--optimizer.lr", "0.5"], "another optimizer.lr than rank 0: 0.5, not"),
        (["--optimizer.head_lr", "0.5"], "another optimizer.head_lr than rank 0: 0.5, not"),
        (["--seed", "3"], "another seed than rank 0: 3, not 0"),
        (["--name", "other"], 'another name than rank 0: "other", not "smoke"'),
    ],
)
def test_a_rank_with_another_configuration(tmp_path: Path, odd: list[str], said: str) -> None:
    assert f"rank 1 has {said}" in on_two_ranks(tmp_path, *odd)
    run = tmp_path / "runs/smoke"
    assert not (run / "config.toml").exists(), "nothing was begun"
    assert run_verdict(run, "the beginning", 3)[0] == "failed", "it would differ again"
    assert "last failure: rank" in status(run)


def test_a_rank_with_other_data(folder: Path) -> None:
    """Its own copy of the data, of the same names and sizes: other pixels, or two files that have changed places."""
    shutil.copytree(folder / "pictures", folder / "copy")
    copy = ["--data.path", str(folder / "copy")]
    stop = ("--until", "score")
    assert on_two_ranks(folder, *copy, extra=stop) == "", "an equal copy elsewhere is the same"
    shutil.rmtree(folder / "runs")
    file = folder / "copy/normal/05.bmp"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert re.match(r"rank 1 has another content of the \w+ files than rank 0$", on_two_ranks(folder, *copy, extra=stop))
    shutil.rmtree(folder / "copy")
    shutil.copytree(folder / "pictures", folder / "copy")
    (folder / "copy/normal/05.bmp").rename(folder / "copy/abnormal/05.bmp")
    assert "rank 1 has another sequence of train inputs than" in on_two_ranks(folder, *copy, extra=stop)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_rank_with_other_weights(folder: Path, engine: str) -> None:
    weights(folder / "other.safetensors", seed=1)
    (folder / "elsewhere").mkdir()
    shutil.copy(folder / "other.safetensors", folder / "elsewhere/net.safetensors")
    odd = ["--model.weights", str(folder / "elsewhere/net.safetensors")]
    assert "rank 1 has another content of the weights file net.safetensors than rank 0" in on_two_ranks(
        folder, *odd, extra=("--engine", engine)
    )


def unseeded(num_outputs: int) -> Net:
    """A model of the user that takes its weights from the time of day."""
    torch.seed()
    return Net(num_outputs)


def without_weights(folder: Path, *more: str) -> list[str]:
    all_words = words(folder, *more)
    at = all_words.index("--model.weights")
    return [*all_words[:at], *all_words[at + 2 :], "--model.build", "tests.train.test_handshake.unseeded"]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_rank_with_weights_of_its_own(folder: Path, engine: str) -> None:
    text = on_two_ranks(folder, extra=("--engine", engine), make=without_weights)
    assert text == "rank 1 has another initial value of body.weight than rank 0"


# -- starts of one run ---------------------------------------------------------------------------------------------------


def test_other_contents_are_found_at_a_later_start(folder: Path) -> None:
    """The same name and size: other ends at once; another middle when the file is read, whatever its time of change says."""
    train = ["train", "smoke.toml", *words(folder, "--engine", "single")]
    output_of(*train, "--until", "score")
    file = folder / "pictures/abnormal/04.bmp"
    good = file.read_bytes()
    at_the_end, in_the_middle = (
        bytes([*good[:at], good[at] ^ 1, *good[at + 1 :]]) for at in (len(good) - 1, len(good) // 2)
    )
    for contents in (at_the_end, in_the_middle):
        file.write_bytes(contents)
        done = dcft(*train, "--until", "select")
        assert done.returncode == 2, done.stdout
        assert re.search(r"04.bmp \(\w+ example \d+\) has other contents than when this run first read it", done.stderr)
    file.write_bytes(good)  # another time of change, the same contents
    output_of(*train, "--until", "select")
    before = file.stat()
    file.write_bytes(in_the_middle)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # hidden from whoever asks for times
    done = dcft("check", *train[1:], "--data", "--hash")
    assert done.returncode == 2 and "04.bmp" in done.stderr and "has other contents" in done.stderr
    file.write_bytes(good)
    assert "30 files" in output_of("check", *train[1:], "--data", "--hash")
    done = dcft("check", *train[1:], "--hash")
    assert done.returncode == 2 and "--sheet and --hash need --data" in done.stderr


def test_data_and_weights_may_move(folder: Path) -> None:
    """To other folders, with other times of change: the run goes on. Another class list or weights stop it."""
    train = ["train", "smoke.toml", *words(folder, "--engine", "single")]
    output_of(*train, "--until", "score")
    (folder / "pictures").rename(folder / "moved")
    (folder / "net.safetensors").rename(folder / "weights.safetensors")
    moved = ["--data.path", str(folder / "moved"), "--model.weights", str(folder / "weights.safetensors")]
    output_of(*train, *moved, "--until", "select")
    weights(folder / "weights.safetensors", seed=1)
    done = dcft(*train, *moved)
    assert done.returncode == 2 and "was begun with another initial value of body.weight (single)" in done.stderr
    weights(folder / "weights.safetensors")
    (folder / "moved/normal").rename(folder / "moved/a")
    done = dcft(*train, *moved)
    assert done.returncode == 2 and "smoke was begun with another list of classes" in done.stderr
    (folder / "moved/a").rename(folder / "moved/normal")
    output_of(*train, *moved)
    done = dcft(*train)  # a finished run is not one of data that lie elsewhere
    assert done.returncode == 2 and "holds a run with another configuration (" in done.stderr


def test_other_code_and_packages_are_recorded(folder: Path) -> None:
    train = ["train", "smoke.toml", *words(folder, "--engine", "single")]
    output_of(*train, "--until", "score")
    facts = read_json(folder / "runs/smoke/facts.json")
    assert "code of tests.train.test_handshake" in facts["first"] and facts["changes"] == []
    facts["first"]["version of torch"] = "2.0.0"
    facts["first"]["code of tests.train.test_handshake"] = "#0"
    (folder / "runs/smoke/facts.json").write_text(json.dumps(facts))
    said = dcft(*train)
    assert said.returncode == 0 and "since the run began, this has changed: " in said.stderr
    changes = read_json(folder / "runs/smoke/summary.json")["changes"]
    assert changes == [f"version of torch: {torch.__version__}, before 2.0.0", "code of tests.train.test_handshake"]
    assert "changed between starts" in (folder / "runs/smoke/report.html").read_text()


# -- files ---------------------------------------------------------------------------------------------------------------


def split_of(files: list[Path]) -> dict[str, Split]:
    return {"train": Split(list(files), [0] * len(files), [str(file) for file in files])}


def test_a_file_is_hashed_once(tmp_path: Path) -> None:
    files = sorted((pictures(tmp_path / "pictures") / "normal").iterdir())
    first = Contents(split_of(files), tmp_path / "kept")
    sums = first.stamp()
    first.keep("now-00000")
    parts = [Contents(split_of(files)).stamp(i, 3)["train"] for i in range(3)]
    assert sum(parts) == sums["train"], "whoever reads which part"
    first.read("train", 4)
    assert first.read_all() == len(files) - 1  # example 4 is known
    first.keep("read-00000")
    later = Contents(split_of(files), tmp_path / "kept")
    later.compact()
    later.load()
    assert (
        later.stamp() == sums and later.read_all() == 0 and [f.name for f in (tmp_path / "kept").iterdir()] == ["all.jsonl"]
    )
    os.utime(files[2])
    again = Contents(split_of(files), tmp_path / "kept")
    again.load()
    assert again.stamp() == sums and again.read_all() == 1, "another time of change: hashed again, and the same"


def test_masks_folders_and_saved_datasets_are_files_too(tmp_path: Path) -> None:
    series = tmp_path / "series"
    series.mkdir()
    for i in range(3):
        (series / f"{i}.dcm").write_bytes(bytes([i]) * 10)
    (tmp_path / "mask.nii").write_bytes(b"mask")
    splits = {"train": Split([(series, tmp_path / "mask.nii")], [tmp_path / "mask.nii"], ["a"])}
    contents = Contents(splits, tmp_path / "kept")
    assert len(contents.files) == 5
    contents.stamp()
    contents.read_all()
    (series / "1.dcm").write_bytes(bytes([9]) * 10)
    for use in (contents.stamp, lambda: contents.read_all(again=True)):
        with pytest.raises(DataError, match=r"1.dcm \(train example 0\) has other contents"):
            use()
    (series / "1.dcm").unlink()
    with pytest.raises(DataError, match=r"1.dcm cannot be read"):
        contents.stamp()


def test_a_copy_with_the_times_of_the_original_is_read_anew(tmp_path: Path) -> None:
    """As `rsync -a` makes it on another node: damage in its middle is found, and where it lies is not compared."""
    files = sorted((pictures(tmp_path / "pictures") / "normal").iterdir())
    first = Contents(split_of(files), tmp_path / "kept")
    sums = first.stamp()
    first.read_all()
    first.keep("now-00000")
    shutil.copytree(tmp_path / "pictures", tmp_path / "copy")  # keeps the times
    copied = [tmp_path / "copy/normal" / file.name for file in files]
    again = Contents(split_of(copied), tmp_path / "kept")
    again.load()
    assert again.stamp() == sums and again.read_all() == len(files)
    before = copied[3].stat()
    data = bytearray(copied[3].read_bytes())
    data[len(data) // 2] ^= 1
    copied[3].write_bytes(data)
    os.utime(copied[3], ns=(before.st_atime_ns, before.st_mtime_ns))
    damaged = Contents(split_of(copied), tmp_path / "kept")
    damaged.load()
    assert damaged.stamp() == sums
    with pytest.raises(DataError, match=r"has other contents than when this run first read it"):
        damaged.read_all()


def test_folders_and_datasets_are_what_is_in_them(tmp_path: Path) -> None:
    """Not the size that a file system gives a folder, nor its own name, nor what an operating system puts into it."""
    import datasets

    for name in ("one", "two"):
        (tmp_path / name / "series").mkdir(parents=True)
        (tmp_path / name / "series/1.dcm").write_bytes(b"slice")
    for i in range(400):  # makes the folder itself larger, for good
        (tmp_path / f"two/series/{i}.tmp").touch()
    for file in (tmp_path / "two/series").glob("*.tmp"):
        file.unlink()
    (tmp_path / "two/series/.DS_Store").write_bytes(b"x")
    one, two = (tmp_path / name / "series" for name in ("one", "two"))
    assert content_of(one) == content_of(two) == [("1.dcm", 5)]
    assert Contents(split_of([one])).stamp() == Contents(split_of([two])).stamp()
    images = [Image.fromarray(np.full((8, 8), i, np.uint8)) for i in range(20)]
    datasets.Dataset.from_dict({"input": images, "label": [0, 1] * 10}).save_to_disk(tmp_path / "job1")
    shutil.copytree(tmp_path / "job1", tmp_path / "job2")
    sums = []
    for name in ("job1", "job2"):
        data = ["--data.path", str(tmp_path / name), "--data.format", "dataset", "--data.modality", "image"]
        sums.append(Contents(user_task(load_config("smoke.toml", data)).splits).stamp())
    assert sums[0] == sums[1] and set(sums[0]) == {"dataset"}
