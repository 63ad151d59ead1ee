"""Whole runs on the user's data: train, evaluate, predict, export, resume."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dcft_dist.config.toml import load_config
from dcft_dist.data.batches import order

from ..data.tables import table, texts
from ..own import drug_table, minilm_copy, mri_folder
from ..processes import dcft, output_of, start


def test_a_metric_that_is_not_there_is_named_before_the_run(tmp_path: Path) -> None:
    file = table(tmp_path, texts())
    words = ["smoke.toml", "--task.name", "own", "--data.path", str(file), "--data.modality", "text", "--engine", "single"]
    words += ["--runs_dir", str(tmp_path), "--train.global_batch", "4", "--importance.num_samples", "4"]
    words += ["--importance.score_batch", "4", "--train.metric", "acuracy"]
    done = dcft("train", *words)
    assert done.returncode == 2 and "no 'acuracy' on the validation data (did you mean 'accuracy'?)" in done.stderr


# -- whole runs ----------------------------------------------------------------------------------------------------------


# MiniLM and a table of reviews, both as files of the user.
MINE = """
extends = "smoke.toml"
name = "mine"
engine = "single"
runs_dir = "FOLDER"
test_resamples = 20
[model]
build = "transformers.AutoModel"
args = {add_pooling_layer = false}
weights = "WEIGHTS"
features = "mean"
[task]
name = "own"
class_weights = "balanced"
[data]
path = "TABLE"
modality = "text"
input = "review"
label = "rating"
group = "drug"
[train]
epochs = 1
global_batch = 16
metric = "balanced_accuracy"
[importance]
num_samples = 32
score_batch = 16
"""


def test_texts_from_a_table_with_an_own_model(tmp_path: Path) -> None:
    """Drug reviews and MiniLM, both as files of the user: run, metrics on other data, predictions, the exported model."""
    weights, data = minilm_copy(tmp_path / "minilm", layers=2), drug_table(tmp_path / "reviews.csv", 120)
    text = MINE.replace("FOLDER", str(tmp_path)).replace("WEIGHTS", str(weights)).replace("TABLE", str(data))
    (tmp_path / "mine.toml").write_text(text)
    shown = output_of("inspect", str(tmp_path / "mine.toml"))
    assert "eligible" in shown and "head.weight" in shown and "tensors read; 2 newly initialised (head.weight" in shown
    shown = output_of("inspect", str(tmp_path / "mine.toml"), "--method", "bitfit")
    assert "frozen" in shown and "eligible" not in shown and "unscored" in shown  # biases alone are trained, and no matrix
    output_of("train", str(tmp_path / "mine.toml"))
    summary = json.loads((tmp_path / "mine/summary.json").read_text())
    assert summary["labels"]["names"] == ["negative", "neutral", "positive"] and summary["num_selected"] > 0
    assert {"auroc", "auprc", "balanced_accuracy", "macro_f1", "ece"} <= summary["test"].keys()
    low, high = summary["test_intervals"]["accuracy"]
    assert low <= summary["test"]["accuracy"] <= high
    other = drug_table(tmp_path / "other.csv", 40, split="test")
    found = json.loads(output_of("evaluate", str(tmp_path / "mine"), "--data.path", str(other), "--test_resamples", "10"))
    said = list(csv.DictReader(output_of("predict", str(tmp_path / "mine"), "--data.path", str(other)).splitlines()))
    rated = [row["rating"] for row in csv.DictReader(other.open())]
    right = np.mean([row["predicted"] == rating for row, rating in zip(said, rated, strict=True)])
    assert found["examples"] == len(said) == 40 and right == pytest.approx(found["metrics"]["accuracy"])
    check_text_export(tmp_path / "mine/model", other, said)
    refused = {
        "which data? Give one of --data.path": [],
        "a finished run takes other data": ["--data.path", str(other), "--optimizer.lr", "1"],
    }
    for message, words in refused.items():
        done = dcft("evaluate", tmp_path / "mine", *words)
        assert done.returncode == 2 and message in done.stderr
    split = ["--data.test", str(other), "--test_resamples", "0"]  # of the run's own files nothing is left over
    split += ["--train.evaluation_batch", "13"]  # the last batch has one example: two ranks of three have none
    again = json.loads(output_of("evaluate", str(tmp_path / "mine"), *split, "--engine", "fsdp2", ranks=3))
    assert again["metrics"] == pytest.approx(found["metrics"], abs=1e-6) and again["examples"] == 40


def check_text_export(folder: Path, file: Path, said: list[dict[str, str]]) -> None:
    """transformers alone gives what `dcft predict` says."""
    from transformers import AutoModel, AutoTokenizer

    with file.open() as lines:
        reviews = [row["review"] for row in csv.DictReader(lines)]
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    head = torch.nn.Linear(384, 3)
    head.load_state_dict(load_file(folder / "head/model.safetensors"))
    batch = tokenizer(reviews, padding=True, truncation=True, max_length=48, return_tensors="pt")
    weights = batch["attention_mask"].unsqueeze(-1).float()
    with torch.no_grad():
        states = model.eval()(**batch).last_hidden_state
        shares = head((states * weights).sum(1) / weights.sum(1)).softmax(-1)
    for i, name in enumerate(("negative", "neutral", "positive")):
        assert [float(row[f"p({name})"]) for row in said] == pytest.approx(shares[:, i].tolist(), abs=1e-5)


def test_images_in_folders_under_a_sharding_engine(tmp_path: Path) -> None:
    """MRI patches as PNG files and DINOv2 as a folder of transformers, on two ranks: regions, then a number."""
    images, weights = mri_folder(tmp_path / "patches", 6), tmp_path / "dino"
    from dcft_dist.models.build import build_model

    packaged = build_model(load_config("mri.toml", ["--model.num_layers", "2"]), 8)
    packaged.module.backbone.save_pretrained(weights)  # type: ignore[union-attr, operator]
    words = ["--runs_dir", str(tmp_path), "--task.name", "own", "--data.format", "image_folder", "--data.path", str(images)]
    words += ["--data.group_pattern", "^(.*)_", "--model.image_size", "56", "--importance.num_samples", "16"]
    words += ["--importance.score_batch", "8", "--train.global_batch", "8", "--train.epochs", "1", "--test_resamples", "0"]
    words += ["--removal.fractions", "[]", "--engine", "fsdp2"]
    how = ["--model.build", "transformers.AutoModel", "--model.weights", str(weights), "--model.features", "cls"]
    for name, model in (("own", how), ("packaged", ["--model.num_layers", "2"])):
        output_of("train", "mri.toml", "--name", name, *words, *model, ranks=2)
    own, wanted = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("own", "packaged"))
    assert own["data_checksum"] == wanted["data_checksum"] and own["num_selected"] == wanted["num_selected"]
    head = [load_file(tmp_path / name / "model/head/model.safetensors") for name in ("own", "packaged")]
    assert head[0].keys() == head[1].keys()
    body = [load_file(tmp_path / name / "model/model.safetensors") for name in ("own", "packaged")]
    assert body[0].keys() == body[1].keys()
    out = output_of("predict", str(tmp_path / "own"), "--data.path", str(images))
    assert len(out.splitlines()) == 1 + 48 and out.startswith("input,group,predicted,p(")
    check_image_export(tmp_path / "own/model", out)
    output_of("delta", str(tmp_path / "own"), str(tmp_path / "own.delta"))
    output_of("delta", str(tmp_path / "own"), str(tmp_path / "own.delta"), "--apply", str(tmp_path / "again"))
    for part, after in (("model.safetensors", body[0]), ("head/model.safetensors", head[0])):
        before = load_file(tmp_path / "again" / part)
        assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    # An image that the second rank alone reads, and nobody has checked.
    Path(list(csv.DictReader(out.splitlines()))[1]["input"]).write_bytes(b"no image")
    done = dcft("predict", tmp_path / "own", "--data.path", images, "--data.check", "false", ranks=2)
    assert done.returncode and "dcft: error: rank 1: " in done.stderr and "cannot be read as an image" in done.stderr


def check_image_export(folder: Path, said: str) -> None:
    """transformers alone gives what `dcft predict` says; its image processor makes nearly the same pixels."""
    from transformers import AutoImageProcessor, AutoModel

    rows = list(csv.DictReader(said.splitlines()))
    model, processor = AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    head = torch.nn.Linear(384, 8)
    head.load_state_dict(load_file(folder / "head/model.safetensors"))
    images = [Image.open(row["input"]).convert("RGB") for row in rows]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images])
    pixels = torch.nn.functional.interpolate(pixels, (56, 56), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = (pixels - mean) / std
    torch.testing.assert_close(processor(images, return_tensors="pt")["pixel_values"], pixels, atol=0.02, rtol=0)
    with torch.no_grad():
        shares = head(model.eval()(pixel_values=pixels).last_hidden_state[:, 0]).softmax(-1)
    found = [[float(value) for key, value in row.items() if key.startswith("p(")] for row in rows]
    torch.testing.assert_close(torch.tensor(found), shares, atol=1e-5, rtol=0)


def test_delta_and_pretrained_weights_are_the_adapted_ones(tmp_path: Path) -> None:
    """Sparse fine-tuning of 1 %: the delta is small, and gives the exported model again bit for bit."""
    words = [
        "--runs_dir",
        str(tmp_path),
        "--name",
        "sparse",
        "--engine",
        "single",
        "--train.epochs",
        "1",
        "--removal.fractions",
        "[]",
    ]
    words += ["--selection.fraction", "0.01", "--penalty.factor", "1.0", "--penalty.rest_factor", "0.0"]
    output_of(
        "train",
        "smoke.toml",
        *words,
        "--penalty.unscored_factor",
        "0.0",
        "--test_resamples",
        "0",
        "--train.fall_back",
        "false",
    )
    run, file = tmp_path / "sparse", tmp_path / "sparse.delta"
    said = output_of("delta", str(run), str(file))
    summary = json.loads((run / "summary.json").read_text())
    changed = int(said.split(": ")[1].split(" of ")[0].replace(",", ""))
    head = 384 * 21 + 21
    assert 0.9 * summary["num_selected"] < changed - head <= summary["num_selected"]
    full = (run / "model/model.safetensors").stat().st_size
    assert file.stat().st_size < full / 32 + 4 * changed + 20_000
    output_of("delta", str(run), str(file), "--apply", str(tmp_path / "again"))
    for part in ("model.safetensors", "head/model.safetensors"):
        before, after = load_file(run / "model" / part), load_file(tmp_path / "again" / part)
        assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert (tmp_path / "again/tokenizer.json").exists() and (tmp_path / "again/config.json").exists()
    other = (run / "config.toml").read_text().replace("num_layers = 2", "num_layers = 1")
    (run / "config.toml").write_text(other)
    done = dcft("delta", run, file, "--apply", tmp_path / "no")
    assert done.returncode == 2 and "other pre-trained weights" in done.stderr


def test_workers_change_no_number_and_classes_are_balanced(tmp_path: Path) -> None:
    """Varied images, read by two processes or by none, in one go or in two: the same weights to the last bit."""
    images = mri_folder(tmp_path / "patches", 16)
    for name in ("frontal", "insula"):
        for file in sorted((images / name).iterdir())[8:]:
            file.unlink()  # few of two classes
    words = ["--runs_dir", str(tmp_path), "--task.name", "own", "--data.format", "image_folder", "--data.path", str(images)]
    words += ["--model.image_size", "28", "--model.num_layers", "1", "--method", "full", "--engine", "single"]
    words += ["--train.global_batch", "8", "--train.epochs", "2", "--test_resamples", "0", "--importance.num_samples", "8"]
    words += [
        "--importance.score_batch",
        "8",
        "--train.sampling",
        "balanced",
        "--train.fall_back",
        "false",
        "--data.validation_share",
        "0.3",
    ]
    words += ["--data.transform", "tests.data.test_images.random_flip", "--import_roots", json.dumps([str(Path.cwd())])]
    found = {}
    for name, more in (("none", []), ("two", ["--train.workers", "2"]), ("plain", ["--train.sampling", "plain"])):
        output_of("train", "mri.toml", "--name", name, *words, *more)
        found[name] = json.loads((tmp_path / name / "summary.json").read_text())["weights_checksum"]
    assert found["none"] == found["two"] != found["plain"]
    torn = ["mri.toml", "--name", "torn", *words, "--train.workers", "2", "--checkpoint.every", "2"]
    (running,) = start("train", *torn)
    while running.poll() is None and not list((tmp_path / "torn/checkpoints").glob("step_0*")):
        time.sleep(0.02)
    running.kill()
    running.wait()
    assert not (tmp_path / "torn/summary.json").exists()
    output_of("train", *torn)
    assert json.loads((tmp_path / "torn/summary.json").read_text())["weights_checksum"] == found["none"]
    classes = [0] * 90 + [1] * 10
    drawn = [classes[i] for i in order(0, 1, 100, classes)]
    assert len(drawn) == 100 and 35 < sum(drawn) < 65
    card = (tmp_path / "two/model/README.md").read_text()
    assert "One of 8 classes: cerebellum, deep grey" in card and "\n| accuracy |" in card and "\n- train: " in card
    assert "\nfull.\n" in card


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    """A stopped run whose table has grown would take former training examples for test ones."""
    file = drug_table(tmp_path / "reviews.csv", 100)
    words = ["smoke.toml", "--runs_dir", str(tmp_path), "--name", "grown", "--engine", "single", "--method", "full"]
    words += ["--task.name", "own", "--data.path", str(file), "--data.modality", "text", "--data.input", "review"]
    words += ["--data.label", "rating", "--train.global_batch", "16", "--train.epochs", "4", "--test_resamples", "0"]
    words += [
        "--importance.num_samples",
        "32",
        "--importance.score_batch",
        "16",
        "--checkpoint.every",
        "1",
        "--log_every",
        "1",
    ]
    (running,) = start("train", *words)
    while running.poll() is None and not list((tmp_path / "grown/checkpoints").glob("step_0*")):
        time.sleep(0.05)
    running.kill()
    running.wait()
    assert not (tmp_path / "grown/summary.json").exists()
    with file.open("a", newline="") as lines:
        csv.writer(lines).writerow(["It helped me a lot.", "positive", "another"])
    done = dcft("train", *words)
    assert done.returncode == 2 and "grown was begun with another number of train examples" in done.stderr
