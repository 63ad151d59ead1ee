"""Exports for other programs: a class of transformers with its head, and ONNX. Both give the outputs of the run's model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.distributed as dist
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
)

from dcft_dist.cli import main
from dcft_dist.config.toml import load_config
from dcft_dist.errors import ConfigError
from dcft_dist.inference.export import adapted_model, export_to_onnx
from dcft_dist.models.example_inputs import example_inputs
from dcft_dist.models.pretrained import Pretrained

from ..objectives.test_losses import ROWS
from ..own import tiny_encoder
from ..processes import output_of
from ..train.test_run import SHORT, SMALL

QUICK = ["--test_resamples", "0", "--removal.fractions", "[]", "--head_warmup.max_epochs", "2", "--engine", "single"]
QUICK += ["--importance.num_samples", "32", "--importance.score_batch", "16", "--train.epochs", "1", "--method", "full"]
QUICK += ["--train.global_batch", "16", "--train.micro_batch", "4", "--optimizer.lr", "1e-3", "--train.fall_back", "false"]


def images(folder: Path, *more: str) -> Path:
    (folder / "blobs.py").write_text(ROWS)
    words = ["--runs_dir", str(folder), "--model.num_layers", "1", "--model.image_size", "28", "--name", "images", *QUICK]
    words += ["--import_roots", f'["{folder}"]', "--data.format", "python", "--data.build", "blobs.rows"]
    output_of("train", "mri.toml", *words, "--task.name", "own", *more)
    return folder / "images"


def texts(folder: Path, encoder: Path, *more: str) -> Path:
    (folder / "texts.toml").write_text(SHORT + SMALL.replace("WEIGHTS", str(encoder)))
    output_of("train", folder / "texts.toml", "--runs_dir", folder, "--name", "texts", *QUICK, *more)
    return folder / "texts"


def model_of(run: Path) -> Pretrained:
    return adapted_model(
        load_config(run / "config.toml"), json.loads((run / "summary.json").read_text())["labels"], run / "model"
    )


def pooled(folder: Path) -> Path:
    """The tiny encoder with a pooler, as BERT has one."""
    source = tiny_encoder(folder / "plain")
    shutil.copytree(source, folder / "pooled")
    config = BertConfig.from_pretrained(source)
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder / "pooled")
    return folder / "pooled"


@torch.no_grad()
def test_transformers_loads_body_and_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DINOv2, of which the library's head reads a mean besides; and BERT with its pooler."""
    run = images(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", (run / "model/README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet.replace("FOLDER", str(run / "model")), names)
    assert type(names["model"]).__name__ == "Dinov2Model"
    assert main(["export", str(run), str(tmp_path / "vision")]) == 0
    assert "a Dinov2ForImageClassification" in capsys.readouterr().out
    model, report = AutoModelForImageClassification.from_pretrained(tmp_path / "vision", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pretrained = model_of(run)
    inputs = example_inputs(load_config(run / "config.toml"), pretrained.module, 4, 8)
    torch.testing.assert_close(model(**inputs).logits, pretrained.module(**inputs), rtol=1e-4, atol=1e-5)
    assert [model.config.id2label[i] for i in range(4)] == ["a", "b", "c", "d"]
    assert (tmp_path / "vision/preprocessor_config.json").is_file()

    run = texts(tmp_path, pooled(tmp_path), "--model.args", "{}", "--model.features", "pooled")
    assert main(["export", str(run), str(tmp_path / "text")]) == 0
    assert "a BertForSequenceClassification" in capsys.readouterr().out
    model, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "text", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pretrained = model_of(run)
    inputs = example_inputs(load_config(run / "config.toml"), pretrained.module, 4, 8)
    torch.testing.assert_close(model(**inputs).logits, pretrained.module(**inputs), rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "text")("fracture of femur")["input_ids"]


@torch.no_grad()
def test_a_number_is_exported_in_the_unit_of_the_labels(tmp_path: Path) -> None:
    rows = ROWS.replace('"label": "abcd"[i % 4]', '"label": 100.0 + 7.5 * (i % 4)')
    (tmp_path / "doses.py").write_text(rows)
    run = images(tmp_path, "--data.build", "doses.rows", "--task.kind", "regression")
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    pretrained, facts = model_of(run), json.loads((run / "summary.json").read_text())["labels"]
    inputs = example_inputs(load_config(run / "config.toml"), pretrained.module, 4, 8)
    expected = pretrained.module(**inputs) * facts["std"] + facts["mean"]
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-3)
    assert model.config.problem_type == "regression" and facts["mean"] > 100
    assert main(["export", str(run), str(tmp_path / "out.onnx"), "--to", "onnx"]) == 0
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-3)


def test_other_heads_are_refused_and_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = texts(tmp_path, tiny_encoder(tmp_path / "encoder"))  # the mean over tokens, which no class of transformers takes
    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    dist.destroy_process_group()
    said = capsys.readouterr().err
    assert (
        "BertForSequenceClassification is not this run's body with a linear head (pooler.dense.weight" in said
        and "Use the run's folder `model`" in said
    )
    assert main(["export", str(run), str(tmp_path / "model.onnx")]) == 2
    assert "model.onnx: add --to onnx for a file" in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "out"), "--to", "onnx"]) == 2
    assert "--to onnx writes a file that ends with .onnx" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_onnx_gives_the_same_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For other sizes than those of the export: more images, and longer texts."""
    for run in (images(tmp_path), texts(tmp_path, tiny_encoder(tmp_path / "encoder"))):
        file = tmp_path / f"{run.name}.onnx"
        assert main(["export", str(run), str(file), "--to", "onnx"]) == 0
        assert "output: outputs" in capsys.readouterr().out and not list(tmp_path.glob(".*.tmp"))
        pretrained, session = model_of(run), onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        inputs = example_inputs(load_config(run / "config.toml"), pretrained.module, 7, 16)
        (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        torch.testing.assert_close(torch.from_numpy(found), pretrained.module(**inputs), rtol=1e-3, atol=1e-4)


class Dice(torch.nn.Module):
    """Gives other outputs each time."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values.mean((1, 2, 3)).unsqueeze(1) + torch.rand(len(pixel_values), 2)


def test_an_onnx_file_with_other_outputs_is_not_kept(tmp_path: Path) -> None:
    nothing: Any = None
    config = load_config("medmnist.toml", ["--data.path", "x"])
    with pytest.raises(ConfigError, match="--to onnx: the "):
        export_to_onnx(Pretrained(Dice(), (), [], nothing), config, {}, tmp_path / "dice.onnx")
    assert not list(tmp_path.iterdir())
