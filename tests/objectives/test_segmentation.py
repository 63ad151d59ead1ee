"""Segmentation: Dice and windows against their definitions, a SwinUNETR on real slabs under a sharding engine, mistakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dcft_dist.engines.prepared import WrapOptions
from dcft_dist.engines.wrap import prepare
from dcft_dist.objectives.segmentation import Segmentation

from ..ranks import run_ranks


def test_dice_distance_and_loss_by_their_definitions() -> None:
    torch.manual_seed(0)
    objective = Segmentation(["none", "a", "b", "c"], [4, 4, 4], 0.25)
    labels = torch.randint(0, 3, (2, 1, 4, 4, 4))  # nothing is of class c
    outputs = torch.randn(2, 4, 4, 4, 4)
    outputs[:, 3] = -99.0
    found = objective.metrics(objective.records(outputs, labels), torch.zeros(2))
    said, wanted = outputs.argmax(1), []
    for name, c in (("a", 1), ("b", 2)):
        pairs = [(s == c, mask[0] == c) for s, mask in zip(said, labels, strict=True)]
        each = [2 * (s & mask).sum() / (s.sum() + mask.sum()) for s, mask in pairs]
        wanted.append(float(sum(each) / 2))
        assert found[f"dice_{name}"] == pytest.approx(wanted[-1], abs=1e-6)
    assert found["dice"] == pytest.approx(sum(wanted) / 2, abs=1e-6) and "dice_c" not in found
    plain = torch.nn.functional.cross_entropy(outputs, labels[:, 0], reduction="none").flatten(1).mean(1)
    assert found["loss"] == pytest.approx(float(plain.mean()), rel=1e-6)
    one, two = objective.losses(outputs[:1], labels[:1]), objective.losses(outputs[1:], labels[1:])
    torch.testing.assert_close(objective.losses(outputs, labels), torch.cat([one, two]))
    apart = torch.full((1, 2, 9, 4, 4), -1.0)
    apart[:, 1, 2] = 1.0
    mask = torch.zeros(1, 1, 9, 4, 4, dtype=torch.long)
    mask[:, :, 5] = 1
    flat = Segmentation(["none", "a"], [9, 4, 4], 0.0)
    assert flat.metrics(flat.records(apart, mask), torch.zeros(1))["hd95"] == 3.0


def test_what_is_in_one_of_both_alone_is_the_worst_there_is() -> None:
    """Three cases: class a right; class a where there is none; class a not found. Class b is nowhere, and left out."""
    objective = Segmentation(["none", "a", "b"], [6, 6], 0.0, spacing=[2.0, 3.0])
    masks, outputs = torch.zeros(3, 1, 6, 6, dtype=torch.long), torch.zeros(3, 3, 6, 6)
    outputs[:, 0] = 1.0
    masks[[0, 2], 0, 2:4, 2:4] = 1
    outputs[:2, 1, 2:4, 2:4] = 2.0
    records = objective.records(outputs, masks)
    assert records[:, 1].tolist() == [1.0, 0.0, 0.0] and records[:, [2, 4]].isnan().all()
    diagonal = (10**2 + 15**2) ** 0.5
    assert records[:, 3].tolist() == pytest.approx([0.0, diagonal, diagonal])
    found = objective.metrics(records, torch.zeros(3))
    assert found["dice"] == pytest.approx(1 / 3) and found["hd95"] == pytest.approx(2 * diagonal / 3)
    assert "dice_b" not in found and set(found) <= set(objective.names(torch.zeros(3)))
    shifted = outputs[:1].roll((1, 0), (2, 3))
    assert objective.metrics(objective.records(shifted, masks[:1]), torch.zeros(1))["hd95"] == 2.0  # mm along the rows


def windows_here() -> Any:
    """Ranks have volumes of different sizes: as many forwards on each, or FSDP would wait for ever."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.Conv3d(2, 2, 1))
    plan = WrapOptions("fsdp2" if ranks > 1 else "single", torch.device("cpu"), [net[0]])
    model = prepare(net, plan, lambda weights: torch.optim.SGD([p for _, p, _ in weights], lr=0.1)).model
    objective, found = Segmentation(["none", "a"], [8, 8, 8], 0.25), []
    for i in range(rank, 2, ranks):
        image = torch.randn(1, 1, 8 + 12 * i, 8, 8, generator=torch.Generator().manual_seed(i))
        with torch.no_grad():
            found.append(objective.whole(lambda batch: model(batch["image"]), {"image": image}))
    return [x.double().sum().item() for x in found]


def test_windows_on_ranks_with_different_volumes() -> None:
    alone = run_ranks(1, windows_here)[0]
    assert [x for (x,) in run_ranks(2, windows_here)] == pytest.approx(alone, rel=1e-6)


def test_windows_make_up_the_whole() -> None:
    """A model that looks at one voxel gives the same in windows; the image is left as it was."""
    torch.manual_seed(0)
    image = torch.randn(1, 1, 20, 17, 8)
    kept = image.clone()
    objective = Segmentation(["none", "a"], [8, 8, 8], 0.25)
    found = objective.whole(lambda batch: torch.cat([batch["image"], -batch["image"]], 1), {"image": image})
    assert torch.equal(image, kept)
    torch.testing.assert_close(found, torch.cat([image, -image], 1))
