"""Random variants by name: functions of seed, epoch and example, with masks that stay on their images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcft_dist.config.toml import load_config
from dcft_dist.data.images import UserImageProcessor
from dcft_dist.data.presets import preset
from dcft_dist.data.user_task import user_task
from dcft_dist.errors import ConfigError

from .test_images import table

VOLUMES = ["--data.modality", "volume", "--task.kind", "segmentation", "--data.classes", '["none", "one", "two"]']


def ball(*space: int) -> dict[str, torch.Tensor]:
    """A volume of which the image shows the mask: a half ball of class 1 and one of class 2, away from the middle."""
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in space), indexing="ij"), -1).float()
    middle = torch.tensor([0.4 * n for n in space])
    mask = ((places - middle).norm(dim=-1) < 0.3 * min(space)).float()
    mask = torch.where((places[..., 0] > middle[0]) & (mask > 0), 2.0, mask)
    return {"image": mask.unsqueeze(0).clone(), "mask": mask.unsqueeze(0).clone()}


@pytest.mark.parametrize("augment", ["light", "strong"])
@pytest.mark.parametrize("space", [(24, 28, 20), (48, 40)])
def test_masks_stay_on_their_images(augment: str, space: tuple[int, ...]) -> None:
    patch = ["--data.patch", str(list(space)), "--data.path", "x", "--task.name", "own", "--data.format", "table"]
    config = load_config("mri.toml", [*VOLUMES, *patch, "--data.augment", augment, "--data.flip", "true"])
    vary = preset(config, config.data.mean)
    agreement, moved = [], []
    for seed in range(12):
        before = ball(*space)
        vary.set_random_state(seed)  # type: ignore[attr-defined]
        torch.manual_seed(seed)
        found = vary({key: value.clone() for key, value in before.items()})
        image, mask = torch.as_tensor(found["image"]), torch.as_tensor(found["mask"])
        assert image.shape == mask.shape == before["image"].shape and set(mask.unique().tolist()) <= {0.0, 1.0, 2.0}
        shown = (image - image.median() > 0.4) == (mask > 0)
        agreement.append(float(shown.double().mean()))
        moved.append(not torch.equal(mask, before["mask"]))
    assert min(agreement) > 0.9 and sum(moved) > 6, agreement


def test_images_are_varied_by_name(tmp_path: Path) -> None:
    for i in range(8):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16), np.uint8)).save(tmp_path / f"{i}.png")
    rows = [{"input": f"{i % 8}.png", "label": i % 2, "n": i} for i in range(20)]
    words = ["--data.path", str(table(tmp_path, rows)), "--task.name", "own", "--model.image_size", "16"]

    def images(*more: str) -> list[torch.Tensor]:
        config = load_config("mri.toml", [*words, *more])
        examples = UserImageProcessor(config)(user_task(config).train)
        return [examples.inputs(range(8), draw)["pixel_values"] for draw in (None, 0, 1, 1, 2)]

    whole, scored, first, again, later = images("--data.augment", "strong")
    assert torch.equal(whole, scored) and torch.equal(first, again) and not torch.equal(first, later)
    assert first.isfinite().all() and not any(torch.equal(a, b.flip(-1)) for a, b in zip(whole, first, strict=True))
    light = images("--data.augment", "light")
    assert (light[2] - whole).abs().mean() < (first - whole).abs().mean()
    plain, _, flipped, *_ = images("--data.flip", "true")
    turned = [torch.equal(a, b.flip(-1)) for a, b in zip(plain, flipped, strict=True)]
    assert 0 < sum(turned) < 8 and all(t or torch.equal(a, b) for t, a, b in zip(turned, plain, flipped, strict=True))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data.augment", "light"], "are for your own images and volumes"),
        (["--data.path", "x", "--data.flip", "true", "--data.transform", "a.b"], "stands in place of data.augment"),
        (["--data.path", "x", "--data.modality", "text", "--data.augment", "light"], "are for your own images and volumes"),
    ],
)
def test_what_does_not_fit(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config("smoke.toml", words)
