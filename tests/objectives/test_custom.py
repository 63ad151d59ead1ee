"""The user's own batches, loss and metrics by import path; a network with batch normalisation in body and head."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dcft_dist.config.toml import load_config
from dcft_dist.data.processors import make_processor
from dcft_dist.data.user_task import user_task
from dcft_dist.errors import ConfigError, DataError
from dcft_dist.models.build import build_model
from dcft_dist.objectives.base import intervals
from dcft_dist.objectives.make import make_objective

from ..processes import dcft, output_of

CODE = """
import torch
from torch import nn
from torch.nn import functional

def rows():  # two numbers of each patient, and whether their sum is positive
    draw = torch.Generator().manual_seed(0)
    found = torch.randn(480, 2, generator=draw).tolist()
    return [{"case": {"age": a, "dose": b}, "label": int(a + b > 0), "patient": i // 2} for i, (a, b) in enumerate(found)]

def collate(cases):
    return {"ages": torch.tensor([c["age"] for c in cases]), "doses": torch.tensor([c["dose"] for c in cases])}

def random_collate(cases):
    return {"ages": torch.rand(len(cases)), "doses": torch.zeros(len(cases))}

def bad_collate(cases):
    return {"ages": torch.tensor([1 / c["age"] if abs(c["age"]) > 0.01 else float("nan") for c in cases])}

def smooth(outputs, labels):
    return functional.cross_entropy(outputs, labels, reduction="none", label_smoothing=0.2)

def mean_loss(outputs, labels):
    return functional.cross_entropy(outputs, labels)

def minus_brier(records, labels):
    return {"minus_brier": -(records.softmax(-1)[:, 1] - labels).square().mean()}

def fussy(records, labels):
    if len(labels.unique()) < 2 or records.abs().max() <= 1:
        raise ValueError("one class alone")
    return {"fussy": 1.0}

def brier_as_mae(records, labels):
    return {"mae": 0.0}

def second_accuracy(records, labels):
    return {"accuracy": 0.0}

def talk(pairs):  # the words of an answer are numbers, as are those of an instruction
    rows = [[int(w) for w in f"{given} {answer}".split()] for given, answer in pairs]
    labels = [[-100] * len(given.split()) + [int(w) for w in answer.split()] for given, answer in pairs]
    return {"input_ids": torch.tensor(rows), "labels": torch.tensor(labels)}

def cut(pairs):
    found = talk(pairs)
    return {**found, "labels": torch.full_like(found["labels"], -100)}

def talks():
    return [{"case": f"{i % 7} {i % 5}", "label": f"{(i + 1) % 7} {i % 5 + 1}", "patient": i} for i in range(320)]

class Speaker(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(8, 16)
        self.mixing = nn.Linear(32, 64)
        self.last = nn.Linear(64, 8)
    def forward(self, input_ids):  # of a word and the one before it
        found = self.words(input_ids)
        return self.last(torch.relu(self.mixing(torch.cat([found, found.roll(1, 1)], -1))))

class Net(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.neck = nn.Sequential(nn.BatchNorm1d(16), nn.BatchNorm1d(16, affine=False))
        self.last = nn.Linear(16, outputs)
    def forward(self, ages, doses):
        return self.last(self.neck(self.body(torch.stack([ages, doses], 1))))
"""


def words(folder: Path, **more: str) -> list[str]:
    (folder / "my_parts.py").write_text(CODE)
    given = {
        "import_roots": json.dumps([str(folder)]),
        "model.build": "my_parts.Net",
        "model.args.outputs": "num_outputs",
        "model.head": '["neck", "last"]',
        "task.name": "own",
        "data.format": "python",
        "data.build": "my_parts.rows",
        "data.input": "case",
        "data.group": "patient",
        "data.modality": "own",
        "data.collate": "my_parts.collate",
        "runs_dir": str(folder),
        "name": "run",
        "importance.num_samples": "32",
        "train.epochs": "2",
        "train.micro_batch": "8",
        "head_warmup.max_epochs": "3",
        "optimizer.lr": "1e-2",
        "test_resamples": "0",
        "removal.fractions": "[]",
        **more,
    }
    return [word for key, value in given.items() for word in (f"--{key}", value)]


def test_a_run_with_own_batches_loss_and_metric(tmp_path: Path) -> None:
    own = {"task.loss": "my_parts.smooth", "task.metrics": '["my_parts.minus_brier"]', "train.metric": "minus_brier"}
    output_of("train", "mri.toml", *words(tmp_path, **own), ranks=2)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["validation"]["minus_brier"] > -0.22 and summary["test"]["accuracy"] > 0.6  # at chance -0.25 and 0.5
    assert summary["num_selected"] == round(0.1 * 32)  # of the one matrix of the body
    found = json.loads(output_of("evaluate", tmp_path / "run", "--data.build", "my_parts.rows"))
    assert found["metrics"]["minus_brier"] > -0.22 and found["examples"] == 480


def test_statistics_of_the_body_stay_while_the_head_is_warmed_up(tmp_path: Path) -> None:
    """Those of the head are its own, and are kept with it."""
    given = words(tmp_path, method="linear_probe")
    output_of("train", "mri.toml", *given, ranks=2)
    before = build_model(load_config("mri.toml", given), 2).module.state_dict()
    after = load_file(tmp_path / "run/model/model.safetensors")
    same = {name for name, value in after.items() if torch.equal(value, before[name])}
    assert same == {name for name in after if name.startswith("body.")} and "body.1.running_mean" in same
    head = load_file(tmp_path / "run/head.safetensors")
    moved = {name: value for name, value in after.items() if name not in same}
    assert {"neck.0.running_var", "neck.1.running_var"} <= moved.keys() and head.keys() == moved.keys()
    assert all(torch.equal(head[name], value) for name, value in moved.items())


def test_random_batches_are_functions_of_seed_epoch_and_examples(tmp_path: Path) -> None:
    config = load_config("mri.toml", words(tmp_path, **{"data.collate": "my_parts.random_collate"}))
    examples = make_processor(config)(user_task(config).train)
    first, again, later, other = (
        examples.inputs(rows, draw)["ages"] for rows, draw in (([0, 1], 1), ([0, 1], 1), ([0, 1], 2), ([1, 2], 1))
    )
    assert torch.equal(first, again) and not torch.equal(first, later) and not torch.equal(first, other)


def test_own_loss_and_metrics(tmp_path: Path) -> None:
    facts: dict[str, Any] = {"names": ["no", "yes"]}
    own = {"task.loss": "my_parts.smooth", "task.metrics": '["my_parts.minus_brier"]'}
    objective = make_objective(load_config("mri.toml", words(tmp_path, **own)), facts)
    outputs, labels = torch.tensor([[0.0, 2.0], [1.0, 0.0]]), torch.tensor([1, 1])
    wanted = torch.nn.functional.cross_entropy(outputs, labels, reduction="none", label_smoothing=0.2)
    assert torch.equal(objective.losses(outputs, labels), wanted)
    assert float(objective.loss(outputs, labels)) == pytest.approx(float(wanted.mean()))
    chances = outputs.softmax(-1)[:, 1]
    found = objective.metrics(outputs.double(), labels)
    assert found["minus_brier"] == pytest.approx(-float((chances - 1).square().mean()), rel=1e-6)
    assert found["accuracy"] == 0.5 and "minus_brier" in objective.names(labels)
    labels = torch.tensor([0, 1] * 20)  # a function that fails on made-up records, and on draws with one class
    config = load_config("mri.toml", words(tmp_path, **{"task.metrics": '["my_parts.fussy"]', "train.metric": "fussy"}))
    objective, sure = make_objective(config, facts), torch.nn.functional.one_hot(labels, 2).double() * 9
    assert "fussy" in objective.names(labels) and objective.metrics(sure, labels)["fussy"] == 1.0
    assert "fussy" not in objective.resampled(sure[::2], labels[::2])
    found = intervals(objective, sure[:2], labels[:2], ["a", "b"], 20)
    assert found is not None and found["fussy"] == [1.0, 1.0]
    for key, path, message in (
        ("task.metrics", '["my_parts.brier_as_mae"]', r"returns mae, a name for which lower is better: rename it"),
        ("task.loss", "my_parts.mean_loss", r"my_parts.mean_loss returns \[\] for 2 examples, not \[2\]"),
        ("task.metrics", '["my_parts.second_accuracy"]', r"returns accuracy, which exists already: rename it"),
        ("task.metrics", '["my_parts.mean_loss"]', r"my_parts.mean_loss fails"),
        ("task.loss", "my_parts.CODE", "has no CODE"),
    ):
        with pytest.raises(ConfigError, match=message):
            bad = make_objective(load_config("mri.toml", words(tmp_path, **{key: path})), facts)
            bad.losses(outputs, torch.tensor([1, 1]))
            bad.metrics(outputs.double(), torch.tensor([1, 1]))


def test_bad_batches_are_named_before_the_run(tmp_path: Path) -> None:
    def check(path: str) -> None:
        config = load_config("mri.toml", words(tmp_path, **{"data.collate": path}))
        task = user_task(config)
        make_processor(config).check([task.train, task.validation, task.test], 0, 1)

    check("my_parts.collate")
    with pytest.raises(
        DataError, match=r"[0-9]+ of 480 examples cannot be used: train example [0-9]+: NaN or infinite values in ages"
    ):
        check("my_parts.bad_collate")
    with pytest.raises(DataError, match=r"480 of 480 .*: train example 0: data.collate: my_parts.smooth fails on"):
        check("my_parts.smooth")
    with pytest.raises(ConfigError, match=r"must return a dictionary of tensors \[1, ...\]"):
        check("numpy.ndim")
    with pytest.raises(ConfigError, match="modality = 'own' and collate go together"):
        load_config("mri.toml", words(tmp_path, **{"data.modality": "text"}))


def test_a_warm_up_in_place_stops_and_keeps_the_best(tmp_path: Path) -> None:
    """Steps that are too long: the loss rises, and the head of the best epoch is where the fine-tuning begins."""
    done = dcft("train", "mri.toml", *words(tmp_path, **{
        "engine": "single", "head_warmup.max_epochs": "40", "head_warmup.lr": "1.0", "head_warmup.patience": "3",
    }))  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = re.search(r"head: (\d+) epochs?, validation loss ([\d.]+)", done.stderr)
    assert found is not None, done.stderr
    epochs = {int(n) for n in re.findall(r"warm-up of the head, epoch (\d+)", done.stderr)}
    assert max(epochs) == int(found.group(1)) + 3 < 40
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    first = next(row["validation/loss"] for row in rows if "validation/loss" in row)
    assert first == pytest.approx(float(found.group(2)), abs=1e-5)
    refused = dcft("train", "mri.toml", *words(tmp_path, engine="deepspeed", name="other"), ranks=2)
    assert refused.returncode == 2 and "cannot be warmed up under deepspeed" in refused.stderr
    assert not (tmp_path / "other/progress.json").exists() or "setup" in (tmp_path / "other/progress.json").read_text()


def test_own_batches_of_instructions(tmp_path: Path) -> None:
    """A language model whose inputs and tokens are the user's: it learns the answers."""
    own = {"task.kind": "causal_lm", "data.collate": "my_parts.talk", "data.build": "my_parts.talks", "train.epochs": "30"}
    given = words(
        tmp_path, **own, **{"model.build": "my_parts.Speaker", "model.head": '["last"]', "train.global_batch": "16"}
    )
    given = [word for i, word in enumerate(given) if "--model.args.outputs" not in given[max(0, i - 1) : i + 1]]
    output_of("train", "mri.toml", *given, ranks=2)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["test"]["exact"] > 0.3 and summary["num_selected"] > 0  # at chance 0
    done = dcft("predict", tmp_path / "run", "--data.build", "my_parts.talks")
    assert done.returncode == 2 and "answers to inputs that data.collate makes cannot be predicted" in done.stderr
    done = dcft("train", "mri.toml", *given, "--data.collate", "my_parts.collate", "--name", "no")
    assert done.returncode == 2 and "data.collate: my_parts.collate fails on" in done.stderr
    done = dcft("check", "--data", "mri.toml", *given, "--data.collate", "my_parts.cut", "--name", "cut")
    assert done.returncode == 2 and "my_parts.cut returned an example without labels to learn" in done.stderr
