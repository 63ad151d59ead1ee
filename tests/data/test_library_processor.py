"""What is said beside the weights about pixels is what the images get."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcft_dist.config.toml import load_config
from dcft_dist.data.images import UserImageProcessor
from dcft_dist.errors import ConfigError, DataError


def _column(values: list[float]) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1)


def test_what_the_processor_beside_the_weights_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What transformers' own image processor makes of an image of the right size."""
    from transformers import ViTImageProcessor

    source = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    for i, facts in enumerate(
        (
            {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]},
            {"do_normalize": False},
            {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
            {"do_rescale": False, "image_mean": [120.0] * 3, "image_std": [60.0] * 3},
        )
    ):
        theirs = ViTImageProcessor(size={"height": 32, "width": 32}, **facts)
        theirs.save_pretrained(tmp_path / str(i))
        if i == 1:  # as older files have it
            facts_there = json.loads((tmp_path / "1/preprocessor_config.json").read_text())
            (tmp_path / "1/preprocessor_config.json").write_text(json.dumps({**facts_there, "size": 32}))
        words = ["--task.name", "own", "--data.path", "x", "--model.image_size", "32", "--model.build", "json.loads"]
        mine = UserImageProcessor(load_config("mri.toml", [*words, "--model.weights", str(tmp_path / str(i))]))
        wanted = theirs(images=source, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(mine.image(source), wanted)
        floats = mine.image(source.astype(np.float32))  # which nobody scales
        torch.testing.assert_close(
            floats, (torch.from_numpy(source).permute(2, 0, 1) - _column(mine.mean)) / _column(mine.std)
        )
        assert "model.image_size" not in caplog.text
        mine.save(tmp_path / str(i))  # what it leaves says the same
        torch.testing.assert_close(
            ViTImageProcessor.from_pretrained(tmp_path / str(i))(images=source, return_tensors="pt")["pixel_values"][0],
            wanted,
        )
    words = [*words[:5], "64", *words[6:], "--model.weights", str(tmp_path / "0")]
    UserImageProcessor(load_config("mri.toml", words))
    assert "model.image_size = 64, but" in caplog.text


@pytest.mark.parametrize(
    "kind",
    ["BitImageProcessor", "ViTImageProcessor", "ConvNextImageProcessor", "CLIPImageProcessor", "MobileViTImageProcessor"],
)
def test_a_processor_of_transformers_resizes_and_crops(kind: str, tmp_path: Path) -> None:
    """With `data.processor` an image of any size and mode becomes what the model has seen, and what the export says."""
    import transformers

    size = {"BitImageProcessor": {"shortest_edge": 40}, "ConvNextImageProcessor": {"shortest_edge": 32}}.get(kind)
    crop = {"crop_size": {"height": 32, "width": 32}, "do_center_crop": True} if kind[:3] in ("Bit", "CLI", "Mob") else {}
    plain = {"height": 32, "width": 32} if kind[:3] == "ViT" else {"shortest_edge": 40}
    theirs = getattr(transformers, kind)(size=size or plain, image_std=[0.2, 0.3, 0.4], **crop)
    theirs.save_pretrained(tmp_path / "model")
    words = ["--task.name", "own", "--data.path", "x", "--model.image_size", "32", "--model.build", "json.loads"]
    words += ["--model.weights", str(tmp_path / "model"), "--data.processor", "true"]
    mine = UserImageProcessor(load_config("mri.toml", words))
    colours = np.random.default_rng(0).integers(0, 256, (53, 75, 3)).astype(np.uint8)
    for source in (colours, colours[:, :, 0]):
        picture = Image.fromarray(source).convert("RGB")
        wanted = theirs(picture, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(mine.image(source), wanted, atol=1e-5, rtol=0)
    whole = UserImageProcessor(load_config("mri.toml", words[:-2])).image(colours)
    assert kind[:3] == "ViT" or (whole - mine.image(colours)).abs().mean() > 0.05  # it makes a difference
    mine.save(tmp_path)
    assert (tmp_path / "preprocessor_config.json").read_text() == (tmp_path / "model/preprocessor_config.json").read_text()
    with pytest.raises(DataError, match=r"array: values from -3 to 1: a picture has values from 0 to 1"):
        mine.image(np.where(colours > 9, 1, -3).astype(np.float32))


def test_a_processor_that_is_not_there_or_does_not_fit(tmp_path: Path) -> None:
    import transformers
    from transformers import ViTImageProcessor

    words = ["--task.name", "own", "--data.path", "x", "--model.image_size", "48", "--model.build", "json.loads"]
    words += ["--model.weights", str(tmp_path), "--data.processor", "true"]
    with pytest.raises(ConfigError, match=r"data.processor: no preprocessing file beside model.weights = "):
        UserImageProcessor(load_config("mri.toml", words))
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"config.json makes images of \[3, 32, 32\]: set model.image_size = 32"):
        UserImageProcessor(load_config("mri.toml", words))
    transformers.CLIPImageProcessor(size={"shortest_edge": 48}, do_center_crop=False).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"makes images of \[3, 48, 72\], which are not square: use data.collate"):
        UserImageProcessor(load_config("mri.toml", words))
    transformers.SamImageProcessor(size={"longest_edge": 48}, pad_size={"height": 48, "width": 48}).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"does more than resize, crop and normalise: use data.collate"):
        UserImageProcessor(load_config("mri.toml", words))  # it pads what is normalised
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchProcessor"}')
    with pytest.raises(ConfigError, match=r"data.processor: .*preprocessor_config.json: ValueError: "):
        UserImageProcessor(load_config("mri.toml", words))
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "config.json").write_text("[1, 2")
    with pytest.raises(ConfigError, match=r"config.json cannot be read"):
        UserImageProcessor(load_config("mri.toml", words))
    (tmp_path / "config.json").write_text("[1, 2]")
    UserImageProcessor(load_config("mri.toml", words[:-2]))  # nothing is said there
    with pytest.raises(ConfigError, match=r"data.processor is for task.name = 'own' with data.modality"):
        load_config("mri.toml", [*words, "--data.modality", "text"])
