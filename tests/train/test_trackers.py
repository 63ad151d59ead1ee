"""Curves in TensorBoard, Weights & Biases and MLflow: the same numbers, one run over several starts, no reason to stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dcft_dist.cli import main
from dcft_dist.config.toml import load_config
from dcft_dist.errors import TemporaryError
from dcft_dist.files import read_json, read_lines
from dcft_dist.runs.folder import RunFolder
from dcft_dist.train import trackers
from dcft_dist.weights import checkpoint

from .test_run import encoder, tiny

__all__ = ["encoder", "tiny"]

OPTIONS = ["--engine", "single", "--removal.fractions", "[]"]
ALL = ["--trackers", '["tensorboard", "wandb", "mlflow"]']


def words(tiny: Path, runs: Path, *more: str) -> list[str]:
    return ["train", str(tiny), "--runs_dir", str(runs), *OPTIONS, *more]


def records(file: Path) -> Iterator[Any]:
    """Of a file of Weights & Biases: 7 bytes, then blocks of 32 KiB with records that begin with checksum, length, kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, whole = Record.FromString(whole), b""
            yield record


def curves_of_wandb(run: Path) -> tuple[set[str], dict[str, dict[int, float]]]:
    """Ids of its starts, and tag -> step -> last value."""
    ids, curves = set[str](), dict[str, dict[int, float]]()
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for record in records(file):
            if record.HasField("run"):
                ids.add(record.run.run_id)
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for key, value in row.items():
                curves.setdefault(key, {})[row["step"]] = value
    return ids, curves


def curves_of_mlflow(runs: Path) -> tuple[set[str], dict[str, dict[int, float]], Any]:
    """The same, and its record of the run."""
    with trackers._at_home():  # its first import asks whether it may send
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=(runs / "mlruns").as_uri())
    found = client.search_runs([client.get_experiment_by_name("dcft_dist").experiment_id])
    curves = {
        key: {metric.step: metric.value for metric in client.get_metric_history(found[0].info.run_id, key)}
        for key in found[0].data.metrics
    }
    return {run.info.run_id for run in found}, curves, found[0]


def curves_of_tensorboard(run: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_one_run_in_every_tracker_over_two_starts(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A start that ends at step 6 and one that goes on: one id, every number of metrics.jsonl, and the test's."""
    write = checkpoint.write_shard_file

    def full(folder: Path, *more: Any) -> Any:
        if "step_00000006" in folder.name:
            raise TemporaryError("no space left")
        return write(folder, *more)

    monkeypatch.setattr(checkpoint, "write_shard_file", full)
    assert main(words(tiny, tmp_path, *ALL, "--checkpoint.every", "3")) == 1
    dist.destroy_process_group()
    first = read_json(tmp_path / "tiny/trackers.json")["ids"]
    assert curves_of_mlflow(tmp_path)[2].info.status == "FAILED"
    monkeypatch.setattr(checkpoint, "write_shard_file", write)
    assert main(words(tiny, tmp_path, *ALL, "--checkpoint.every", "3")) == 0
    said = capsys.readouterr()
    assert "wandb" not in said.out + said.err and "mlflow" not in (said.out + said.err).lower()

    run, logged = tmp_path / "tiny", dict[str, dict[int, float]]()
    for row in read_lines(run / "metrics.jsonl"):
        for key in row.keys() - {"step"}:
            logged.setdefault(key, {})[row["step"]] = row[key]
    test = read_json(run / "summary.json")["test"]
    assert len(logged["train/loss"]) == 10 and "validation/accuracy" in logged
    assert read_json(run / "trackers.json") == {"run": "tiny", "ids": first}
    ids, curves = curves_of_wandb(run)
    assert ids == {first["wandb"]} and len(list(run.glob("wandb/offline-run-*"))) == 2
    for found in (curves, curves_of_mlflow(tmp_path)[1], curves_of_tensorboard(run)):
        for key, expected in logged.items():
            assert found[key] == pytest.approx(expected, rel=1e-6), key
        assert {key: list(found[f"test/{key}"].values())[-1] for key in test} == pytest.approx(test, rel=1e-6)
        assert "speed/samples_per_s" in found
    ids, _, record = curves_of_mlflow(tmp_path)
    assert ids == {first["mlflow"]} and record.info.status == "FINISHED" and record.data.params["train.epochs"] == "2"
    assert record.info.run_name == "tiny"


def test_the_numbers_of_a_run_do_not_depend_on_trackers(tiny: Path, tmp_path: Path) -> None:
    checksums = set()
    for number, names in enumerate(([], ["tensorboard"], ["mlflow", "wandb"])):
        assert main(words(tiny, tmp_path / str(number), "--trackers", json.dumps(names))) == 0
        checksums.add(read_json(tmp_path / f"{number}/tiny/summary.json")["weights_checksum"])
        assert (tmp_path / f"{number}/tiny/tensorboard").exists() == ("tensorboard" in names)
    assert len(checksums) == 1


def test_a_tracker_that_fails_is_left_out(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that cannot be reached, a disk that is full: said once, and the others go on."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://x")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trackers._TensorBoard, "log", full)
    assert main(words(tiny, tmp_path, *ALL)) == 0
    said = [record.message for record in caplog.records if "the run goes on without it" in record.message]
    assert [line.split()[2] for line in said] == ["mlflow", "tensorboard"], said
    assert len(curves_of_wandb(tmp_path / "tiny")[1]["train/loss"]) == 10


def test_a_tracker_that_is_not_installed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = trackers.find_spec
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "wandb" else found(name))
    assert main(words(tiny, tmp_path, *ALL)) == 2
    dist.destroy_process_group()
    assert "trackers: wandb is not installed: pip install 'dcft_dist[trackers]'" in capsys.readouterr().err


IDS = [
    {"run": "tiny", "ids": {"wandb": "../../x", "mlflow": "0" * 32, "tensorboard": [1]}},
    {"run": "tiny", "ids": {"wandb": 12345678, "mlflow": 5}},
    {"run": "tiny", "ids": ["wandb"]},
    {"run": "another", "ids": {"wandb": "abcd1234", "mlflow": "0" * 32}},
    [1],
]


@pytest.mark.parametrize("content", IDS, ids=str)
def test_ids_that_are_not_of_this_run(content: Any, tmp_path: Path) -> None:
    """Of a copied run, of another place, or of no form: the run gets new ones."""
    config = load_config("smoke.toml", ["--runs_dir", str(tmp_path), "--name", "tiny", *ALL])
    folder = RunFolder.of(config)
    folder.path.mkdir()
    folder.trackers.write_text(json.dumps(content))
    opened = trackers.Trackers(folder, config, active=True)
    opened.begin(0)
    opened.log(1, {"train/loss": 0.5})
    opened.close("done")
    kept = read_json(folder.trackers)
    assert kept["run"] == "tiny" and kept["ids"].keys() == {"wandb", "mlflow"}
    assert kept["ids"]["wandb"] not in ("../../x", "abcd1234") and kept["ids"]["mlflow"] != "0" * 32
    assert curves_of_mlflow(tmp_path)[:2] == ({kept["ids"]["mlflow"]}, {"train/loss": {1: 0.5}})


def test_nothing_is_sent(tiny: Path, tmp_path: Path) -> None:
    """No socket to another machine, and neither MLflow's telemetry nor wandb's reports, in a process of its own."""
    script = f"""
import socket, sys
connect = socket.socket.connect
def noted(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
        print("CONNECTS TO", address, flush=True)
    return connect(self, address)
socket.socket.connect = noted
from dcft_dist.cli import main
assert main({words(tiny, tmp_path, *ALL, "--train.epochs", "1")!r}) == 0
import mlflow.telemetry, os, threading
assert mlflow.telemetry.get_telemetry_client() is None
assert "_MLFLOW_TELEMETRY_SESSION_ID" not in os.environ and "MLFLOW_DISABLE_TELEMETRY" not in os.environ
print("DONE", flush=True)
"""
    environment = {key: value for key, value in os.environ.items() if key != "CI"}  # in which MLflow is silent by itself
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert found.returncode == 0 and "DONE" in found.stdout and "CONNECTS TO" not in found.stdout, (
        found.stdout + found.stderr
    )


def test_a_tracker_that_does_not_answer(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It holds up neither the training nor, for long, the end."""
    forever = threading.Event()
    monkeypatch.setattr(trackers._MLflow, "__init__", lambda *_: forever.wait(300))
    monkeypatch.setattr(trackers, "CLOSE_S", 1.0)
    began = time.monotonic()
    assert main(words(tiny, tmp_path, "--trackers", '["tensorboard", "mlflow"]', "--train.epochs", "1")) == 0
    assert time.monotonic() - began < 60
    assert "the trackers tensorboard and mlflow do not answer: given up after 1 s" in caplog.text
    forever.set()
    for thread in threading.enumerate():
        if thread.name == "dcft_dist: trackers":
            thread.join(30)  # it puts the environment back


def test_names_that_mlflow_does_not_take(tmp_path: Path) -> None:
    config = load_config("smoke.toml", ["--runs_dir", str(tmp_path), "--name", "it"])
    folder = RunFolder.of(config)
    folder.path.mkdir()
    with trackers._at_home():
        tracker = trackers._MLflow(folder, config, None, 0)
    tracker.log(1, {"validation/dice_atrium (LA), left": 0.5})
    tracker.close("done")
    assert curves_of_mlflow(tmp_path)[1] == {"validation/dice_atrium _LA__ left": {1: 0.5}}
