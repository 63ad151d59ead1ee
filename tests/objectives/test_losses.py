"""Losses by name: those of torch and MONAI, one value for each example; and mixed images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import monai.losses
import numpy as np
import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional

from dcft_dist.cli import main
from dcft_dist.config.toml import load_config
from dcft_dist.data.mixing import mixed
from dcft_dist.errors import ConfigError
from dcft_dist.objectives.base import Objective
from dcft_dist.objectives.make import make_objective

DRAW = torch.Generator().manual_seed(0)
LOGITS = torch.randn(6, 4, generator=DRAW)
CLASSES = torch.tensor([0, 1, 2, 3, 1, 1])
FINDINGS = torch.tensor([[1.0, 0, 0, 1], [0, 0, float("nan"), 1], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]])


def objective_of(kind: str, *words: str, **facts: Any) -> Objective:
    config = load_config("medmnist.toml", ["--task.kind", kind, *words]) if kind != "segmentation" else None
    if config is None:
        config = load_config("swin_unetr.toml", list(words))
    names = {"names": ["a", "b", "c", "d"], "mean": 2.0, "std": 0.5, "grades": None, **facts}
    return make_objective(config, names)


def test_label_smoothing_is_that_of_torch() -> None:
    weights = [0.5, 2.0, 1.0, 1.0]
    found = objective_of("single_label", "--task.label_smoothing", "0.2", class_weights=weights).losses(LOGITS, CLASSES)
    expected = functional.cross_entropy(LOGITS, CLASSES, torch.tensor(weights), label_smoothing=0.2, reduction="none")
    assert torch.equal(found, expected)
    plain = objective_of("single_label").losses(LOGITS, CLASSES)
    assert torch.equal(plain, functional.cross_entropy(LOGITS, CLASSES, reduction="none")) and not torch.equal(plain, found)


def test_focal_loss_of_classes_and_findings() -> None:
    """Lin et al. 2017: (1 - p)^gamma times the cross-entropy."""
    words = ["--task.loss", "focal", "--task.loss_args", "{gamma = 1.5}"]
    log_p = LOGITS.log_softmax(-1)[torch.arange(6), CLASSES]
    found = objective_of("single_label", *words).losses(LOGITS, CLASSES)
    torch.testing.assert_close(found, -((1 - log_p.exp()) ** 1.5) * log_p)
    multi = ["--data.label", '["a", "b", "c", "d"]', "--data.format", "table"]
    each = functional.binary_cross_entropy_with_logits(LOGITS, FINDINGS.nan_to_num(), reduction="none")
    each = each * (1 - (-each).exp()) ** 1.5 * ~FINDINGS.isnan()
    torch.testing.assert_close(objective_of("multi_label", *words, *multi).losses(LOGITS, FINDINGS), each.sum(-1) / 4)


@pytest.mark.parametrize("name", ["l1", "huber"])
def test_errors_of_a_number_are_in_units_of_its_spread(name: str) -> None:
    words = ["--task.loss", name, *(["--task.loss_args", "{delta = 0.3}"] if name == "huber" else [])]
    numbers = torch.tensor([1.0, 2.0, 5.0])
    found = objective_of("regression", *words, "--data.format", "table").losses(LOGITS[:3, :1], numbers)
    away = (LOGITS[:3, 0] - (numbers - 2.0) / 0.5).abs()
    expected = away if name == "l1" else torch.where(away < 0.3, 0.5 * away.square(), 0.3 * (away - 0.15))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("name", "kind", "args"),
    [
        ("dice_focal", monai.losses.DiceFocalLoss, {"gamma": 3.0, "lambda_focal": 0.5}),
        ("generalized_dice_focal", monai.losses.GeneralizedDiceFocalLoss, {}),
        ("tversky", monai.losses.TverskyLoss, {"alpha": 0.3, "beta": 0.7}),
    ],
)
def test_losses_of_masks_are_those_of_monai(name: str, kind: Any, args: dict[str, float]) -> None:
    """Each patch alone: an example counts the same in every batch."""
    table = "{" + ", ".join(f"{key} = {value}" for key, value in args.items()) + "}"
    words = ["--task.loss", name, "--task.loss_args", table, "--data.classes", '["a", "b", "c", "d"]']
    logits, masks = torch.randn(3, 4, 5, 5, 5, generator=DRAW), torch.randint(0, 4, (3, 1, 5, 5, 5), generator=DRAW)
    logits.requires_grad_()
    found = objective_of("segmentation", *words).losses(logits, masks)
    theirs = kind(to_onehot_y=True, softmax=True, **args)
    torch.testing.assert_close(found, torch.stack([theirs(logits[i : i + 1], masks[i : i + 1]) for i in range(3)]))
    assert objective_of("segmentation", *words).losses(logits[:0], masks[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("kind", "words", "said"),
    [
        ("single_label", ["--task.loss", "focl"], "no 'focl' for kind = 'single_label' .did you mean 'focal'"),
        ("single_label", ["--task.loss", "huber"], "use focal, or an import path"),
        ("single_label", ["--task.loss", "focal", "--task.loss_args", "{gama = 1}"], "loss_args: focal does not take them"),
        ("single_label", ["--task.loss", "focal", "--task.loss_args", '{gamma = "x"}'], "focal does not take them: Type"),
        ("single_label", ["--task.loss", "focal", "--task.loss_args", "{weight = [1.0, 2.0]}"], "focal does not take them"),
        ("single_label", ["--task.loss", "focal", "--task.loss_args", "{to_onehot_y = true}"], "to_onehot_y cannot be set"),
        ("single_label", ["--task.loss_args", "{gamma = 1}"], "loss_args are for a loss by name"),
        ("single_label", ["--task.loss", "focal", "--task.label_smoothing", "0.1"], "label_smoothing is for"),
        ("regression", ["--task.label_smoothing", "0.1", "--data.format", "table"], "label_smoothing is for"),
        ("regression", ["--train.mixup", "0.1", "--data.format", "table"], "are for images or volumes with classes"),
    ],
)  # fmt: skip
def test_what_does_not_fit(kind: str, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        objective_of(kind, *words)


# -- mixed examples ----------------------------------------------------------------------------------------------------


def batch_of(labels: Tensor, *space: int) -> dict[str, Tensor]:
    size = len(labels)
    images = torch.arange(1.0, size + 1).view(size, 1, *[1] * len(space)).expand(size, 2, *space).clone()
    return {
        "pixel_values": images,
        "labels": labels,
        "index": torch.arange(size),
        "real": torch.ones(size, dtype=torch.bool),
    }


def test_mixup_blends_neighbours_and_their_labels() -> None:
    batch = batch_of(CLASSES, 3, 3)
    found = mixed(batch, mixup=0.4, cutmix=0.0, classes=4, seed=3)
    share = float(np.random.default_rng(3).beta(0.4, 0.4))
    images, one_hot = batch["pixel_values"], functional.one_hot(CLASSES, 4).float()
    torch.testing.assert_close(found["pixel_values"], share * images + (1 - share) * images.roll(1, 0))
    torch.testing.assert_close(found["labels"], share * one_hot + (1 - share) * one_hot.roll(1, 0))
    assert torch.equal(found["index"], batch["index"]) and torch.equal(batch["labels"], CLASSES)


@pytest.mark.parametrize("space", [(40, 60), (24, 20, 28)])
def test_cutmix_pastes_a_box_and_counts_what_it_has_pasted(space: tuple[int, ...]) -> None:
    shares = []
    for seed in range(60):
        batch = batch_of(torch.tensor([[1.0, 0.0], [0.0, float("nan")]]), *space)
        found = mixed(batch, mixup=0.0, cutmix=1.0, classes=2, seed=seed)
        foreign = found["pixel_values"] != batch["pixel_values"]
        assert torch.equal(foreign[0], foreign[1])
        shares.append(1 - float(foreign[0, 0].double().mean()))
        assert found["labels"][0, 0] == pytest.approx(shares[-1], abs=1e-6) and found["labels"][1, 1].isnan()
    assert 0.0 < min(shares) < 0.6 and 0.9 < max(shares) <= 1.0  # lam is uniform; boxes are cut at the borders


def test_both_share_the_batches_between_them() -> None:
    batch = batch_of(CLASSES, 32, 32)
    kinds = [len(mixed(batch, 1.0, 1.0, 4, seed)["pixel_values"][0].unique()) for seed in range(100)]
    blended = [seed for seed, values in enumerate(kinds) if values == 1]
    assert 30 < len(blended) < 70


def test_a_single_example_cannot_be_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "alone.py").write_text(ROWS)
    words = ["--runs_dir", str(tmp_path), "--model.num_layers", "1", "--model.image_size", "28", "--task.name", "own"]
    words += ["--import_roots", f'["{tmp_path}"]', "--data.format", "python", "--data.build", "alone.rows"]
    words += ["--train.micro_batch", "1", "--train.mixup", "0.2", "--engine", "single", "--importance.num_samples", "32"]
    assert main(["train", "mri.toml", *words]) == 2
    dist.destroy_process_group()
    assert "each has only one: raise train.micro_batch" in capsys.readouterr().err


ROWS = """
import numpy as np

def rows():
    draw = np.random.default_rng(0)
    return [{"input": draw.integers(60 * (i % 4), 60 * (i % 4) + 60, (28, 28, 3), dtype=np.uint8), "label": "abcd"[i % 4]}
            for i in range(96)]
"""
