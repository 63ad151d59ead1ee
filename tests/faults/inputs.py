"""Random input for the fuzz tests: configurations, tables, command lines, and files of runs and models."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from hypothesis import strategies as st

from dcft_dist.cli import main
from dcft_dist.cluster.job import Site, make_job
from dcft_dist.cluster.render import render_sbatch, render_torchrun
from dcft_dist.config.schema import Config, sections
from dcft_dist.config.task import Data
from dcft_dist.config.toml import differences, load_config, to_toml
from dcft_dist.config.trust import named_code
from dcft_dist.data.readers import read_rows
from dcft_dist.data.tables import records
from dcft_dist.errors import DcftError
from dcft_dist.files import json_line, write_json
from dcft_dist.runs.folder import RunFolder, identity
from dcft_dist.runs.status import run_verdict, status
from dcft_dist.weights.checkpoint import damage_in, is_complete
from dcft_dist.weights.weight_files import WeightFiles

# -- values ------------------------------------------------------------------------------------------------------------

texts = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [
            "",
            "..",
            "../x",
            "/",
            "\0",
            "\n",
            "\x7f",
            "'",
            '"',
            "a.b",
            "a:b",
            "-1",
            "nan",
            "x" * 5000,
            "7" * 5000,
            "[" * 3000,
            "(",
            "$(id)",
        ]
    ),
)
numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([10**400, -1, 0, 2**63, 1e308, float("nan"), float("inf")]))
dates = st.one_of(st.dates(), st.times(), st.datetimes())
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
json_values: Any = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)), max_leaves=8
)


def deep(levels: int) -> str:
    """A list in a list in a list."""
    return "[" * levels + "]" * levels


# -- configurations ----------------------------------------------------------------------------------------------------

KEYS = [f"{prefix}.{key}" if prefix else key for prefix, section in sections() for key in section.model_fields]
USUAL = [
    *[
        "true",
        "1",
        "0.5",
        "'auto'",
        "[]",
        "['a']",
        "{}",
        "{a = nan}",
        "{a = {b = [inf, 1]}}",
        "1979-05-27",
        "07:32:00",
        "'own'",
        "fsdp2",
        "zero3",
    ]
]
USUAL += [*["'timm.create_model'", "[1, 2]", "''", "'([' ", "{x = [[1979-05-27T07:32:00Z]]}", "'tests.nets:make'"]]
words_of_values = st.one_of(st.sampled_from(USUAL), texts, numbers.map(repr), st.integers(1, 3000).map(deep))
overrides = st.lists(
    st.tuples(st.one_of(st.sampled_from(KEYS), texts), words_of_values).map(lambda pair: f"--{pair[0]}={pair[1]}"),
    max_size=6,
)


def check_configuration(words: list[str]) -> None:
    """It is refused in words, or can be written and read again as it is."""
    try:
        config = load_config("icd.toml", words)
    except DcftError:
        return
    text = to_toml(config)
    assert not differences(text, text)
    import tomllib

    again = Config.model_validate(tomllib.loads(text))
    assert json.dumps(again.model_dump()) == json.dumps(config.model_dump()), "as it was"
    assert identity(config) == identity(again)
    named_code(config)


toml_bytes = st.one_of(
    st.binary(max_size=60),
    texts.map(lambda text: text.encode(errors="surrogatepass")),
    st.lists(st.tuples(st.sampled_from([*KEYS, "extends", "a.b.c"]), words_of_values), max_size=5).map(
        lambda pairs: "\n".join(f"{key} = {value}" for key, value in pairs).encode(errors="surrogatepass")
    ),
)


def check_toml(content: bytes, folder: Path) -> None:
    (folder / "config.toml").write_bytes(content)
    for read in (lambda: load_config(folder / "config.toml"), lambda: RunFolder(folder).changes(Config(name="x"))):
        with suppress(DcftError):
            read()


# -- tables ------------------------------------------------------------------------------------------------------------

cells = st.one_of(texts, numbers.map(str))
tables = st.one_of(
    st.tuples(st.sampled_from([".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt"]), st.binary(max_size=200)),
    st.lists(st.lists(cells, max_size=4).map(",".join), max_size=5).map(
        lambda lines: (".csv", "\n".join(lines).encode(errors="replace"))
    ),
    st.lists(json_values.map(lambda v: json.dumps(v, default=str)), max_size=4).map(
        lambda lines: (".jsonl", "\n".join(lines).encode())
    ),
    st.integers(1, 100_000).map(lambda levels: (".jsonl", b'{"a":' * levels)),
    st.just((".jsonl", b'{"a": ' + b"1" * 5000 + b"}")),
)


def check_table(table: tuple[str, bytes], folder: Path) -> None:
    suffix, content = table
    file = folder / f"table{suffix}"
    file.write_bytes(content)
    for read in (
        lambda: list(records(file)),
        lambda: read_rows(Data(path=str(file), modality="text"), ()),
        lambda: read_rows(Data(path=str(file), modality="image", group="g"), ()),
    ):
        with suppress(DcftError):
            read()


arrays = st.one_of(
    st.sampled_from([np.float64(3), np.zeros((2, 0)), np.zeros((3, 4, 4), np.uint8), np.zeros(3, "U3"), np.array(1)]),
    st.lists(st.integers(0, 4), max_size=4).map(lambda shape: np.zeros(shape, np.uint8)),
)
packs = st.one_of(
    st.binary(max_size=100),
    st.dictionaries(
        st.sampled_from([f"{s}_{k}" for s in ("train", "val", "test") for k in ("images", "labels")]), arrays, max_size=6
    ),
)


def check_pack(content: bytes | dict[str, Any], folder: Path) -> None:
    file = folder / "pack.npz"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.savez(file, **content)
    for label in ("label", ["a", "b"]):
        with suppress(DcftError):
            read_rows(Data(format="medmnist", path=str(file), label=label), ())


# -- files of models ---------------------------------------------------------------------------------------------------

headers = st.one_of(
    st.binary(max_size=100),
    st.tuples(st.integers(0, 2**64 - 1), json_values).map(lambda p: struct.pack("<Q", p[0]) + json.dumps(p[1]).encode()),
    json_values.map(lambda v: struct.pack("<Q", len(json.dumps(v))) + json.dumps(v).encode()),
    st.integers(1, 20_000).map(lambda n: struct.pack("<Q", 5 * n) + b'{"a":' * n),
)
model_files = st.tuples(
    st.sampled_from(
        ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]
    ),
    st.one_of(
        headers,
        json_values.map(lambda v: json.dumps(v).encode()),
        json_values.map(lambda v: json.dumps({"weight_map": v}).encode()),
    ),
)


def check_model(file: tuple[str, bytes], folder: Path) -> None:
    from dcft_dist.tensor_file import is_altered, stored_checksum

    place = folder / "model"
    place.mkdir(exist_ok=True)
    for old in place.iterdir():
        old.unlink()
    (place / file[0]).write_bytes(file[1])
    stored_checksum(place / file[0])
    for read in (lambda: is_altered(place / file[0]), lambda: _all_of(place)):
        with suppress(DcftError, ValueError):  # its callers take a ValueError for a damaged file
            read()


def _all_of(place: Path) -> None:
    with WeightFiles(place) as files:
        for name in files:
            files.shape(name)


# -- files of a run ----------------------------------------------------------------------------------------------------

RUN_FILES = [
    "progress.json",
    "attempts.jsonl",
    "metrics.jsonl",
    "summary.json",
    "estimate.json",
    "facts.json",
    "removal.json",
    "config.toml",
    "errors/00001-rank00000.json",
    "checkpoints/step_00000001/manifest.json",
]
_ERROR = {"time": "", "clock": 1, "rank": 0, "host": "", "kind": "", "message": "", "permanent": True, "attempt": 1}
_SUMMARY = [
    "name",
    "method",
    "engine",
    "ranks",
    "validation",
    "test",
    "seconds",
    "removal",
    "caveat",
    "splits",
    "optimizer",
    "labels",
    "files",
]
_MANIFEST = {"format": 2, "name": "step_00000001", "identity": {}, "files": {"state.json": {}}}
SHAPES: dict[str, dict[str, Any]] = {
    "progress.json": {"phase": "train", "step": 1, "steps": 3, "seconds": {}, "seconds_per_step": 1.0},
    "attempts.jsonl": {"time": "", "at": "", "ranks": 1, "nodes": None, "job": None, "restart": 0},
    "errors/00001-rank00000.json": _ERROR,
    "summary.json": {key: {} for key in _SUMMARY},
    "estimate.json": dict.fromkeys(("seconds_per_step", "steps", "hours", "device", "device_hours", "time", "end"), 1.0),
    "checkpoints/step_00000001/manifest.json": _MANIFEST,
    "facts.json": {"first": {}, "changes": [], "files": {}},
}


@st.composite
def run_files(draw: Callable[..., Any]) -> tuple[str, bytes]:
    """A file of a run with another shape: any bytes, any JSON, or what is expected with some values replaced."""
    name = draw(st.sampled_from(RUN_FILES))
    kind = draw(st.sampled_from(["bytes", "json", "like"]))
    if kind == "bytes" or name == "config.toml":
        return name, draw(toml_bytes if name == "config.toml" else st.binary(max_size=60))
    value = draw(json_values)
    if kind == "like":
        value = dict(SHAPES.get(name, {}))
        for key in draw(st.lists(st.sampled_from(sorted(value) or ["a"]), max_size=3)):
            value[key] = draw(json_values)
    if draw(st.booleans()) and isinstance(value, dict | list):
        return name, json_line(value).encode()
    return name, json.dumps(value).encode()


def make_run(folder: Path) -> None:
    """A folder that looks like a run."""
    (folder / "errors").mkdir(parents=True)
    (folder / "checkpoints/step_00000001").mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(Config(name="run")))
    for name in ("progress.json", "summary.json"):
        write_json(folder / name, SHAPES[name])


def check_run(file: tuple[str, bytes], folder: Path) -> None:
    run = folder / "run"
    if not run.exists():
        make_run(run)
    target = run / file[0]
    before = target.read_bytes() if target.exists() else None
    target.write_bytes(file[1])
    try:
        for command in (
            ["status", str(run)],
            ["table", str(run)],
            ["report", str(run)],
            ["verify", str(run)],
            ["table", "--removal", str(run)],
        ):
            assert main(command) in (0, 1, 2)
        place = run / "checkpoints/step_00000001"
        is_complete(place), damage_in(place)
    finally:
        target.unlink() if before is None else target.write_bytes(before)


def check_small(name: str, content: bytes, folder: Path) -> None:
    """A file of a run, by the functions that read it."""
    run = folder / "run"
    if not run.exists():
        make_run(run)
    (run / name).write_bytes(content)
    status(run)
    run_verdict(run, "the beginning", 3)
    is_complete(run / "checkpoints/step_00000001"), damage_in(run / "checkpoints/step_00000001")
    for file in [*(run / "errors").glob("*"), run / "attempts.jsonl"]:
        file.unlink(missing_ok=True)


# -- command lines -----------------------------------------------------------------------------------------------------

COMMANDS = [
    "status",
    "report",
    "table",
    "verify",
    "submit",
    "plan",
    "compare",
    "delta",
    "predict",
    "config-reference",
    "--version",
]
OPTIONS = [
    "--nodes",
    "--time",
    "--cpus-per-task",
    "--gpus-per-node",
    "--ranks-per-node",
    "--with",
    "--dry-run",
    "--smoke",
    "--verdict",
    "--share",
    "--format",
    "--pack",
    "--ranks",
    "--json",
    "--name",
    "--optimizer.lr",
    "--train.global_batch",
]
arguments = st.one_of(
    st.sampled_from(
        [
            "icd.toml",
            "smoke.toml",
            "/nowhere",
            "run",
            "abc",
            "-5",
            "0",
            "1",
            "2",
            "8",
            "24:00:00",
            "1-0",
            "slurm",
            "torchrun",
            "md",
            "1/2",
        ]
    ),
    st.sampled_from(OPTIONS),
    texts.filter(lambda text: "\0" not in text),
)
command_lines = st.tuples(st.sampled_from(COMMANDS), st.lists(arguments, max_size=5)).map(
    lambda p: [p[0], *p[1], *(["--dry-run"] if p[0] == "submit" else ["--wait", "0"] if p[0] == "compare" else [])]
)


def check_command(words: list[str]) -> None:
    threads = torch.get_num_threads()
    try:
        code: Any = main(words)
    except SystemExit as end:  # of argparse
        code = end.code
    if dist.is_initialized():  # a command ends its process with the group
        dist.destroy_process_group()
    os.environ.pop("TQDM_DISABLE", None)  # as a study sets it
    torch.set_num_threads(threads)
    assert code in (0, 1, 2, 75)


sizes = st.fixed_dictionaries(
    {"nodes": st.integers(-2, 4)},
    optional={
        "gpus_per_node": st.integers(-2, 8),
        "ranks_per_node": st.one_of(st.none(), st.integers(-1, 4)),
        "cpus_per_task": st.one_of(st.none(), st.integers(-5, 8)),
        "time": st.one_of(st.none(), texts, st.sampled_from(["24:00:00", "1-0", "90", "1:2\n#SBATCH --uid=0"])),
    },
)
sites = st.dictionaries(
    st.sampled_from(sorted(Site.model_fields)), st.one_of(texts, st.lists(texts, max_size=2), numbers), max_size=3
)


def check_job(size: dict[str, Any], site: dict[str, Any]) -> None:
    """No line that begins with #SBATCH comes from a value."""
    from pydantic import ValidationError

    try:
        checked = Site.model_validate(site)
        job, _ = make_job(
            "smoke.toml", ["--train.global_batch", "48", "--importance.score_batch", "48"], smoke=False, site=checked, **size
        )
    except (DcftError, ValidationError):
        return
    text = render_sbatch(job, checked)
    render_torchrun(job, checked)
    options = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert all(line.startswith("#SBATCH --") for line in options)
    allowed = 9 + len(checked.sbatch) + len(site)
    assert len(options) <= allowed, options
