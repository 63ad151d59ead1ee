"""Volumes or images with their masks, for segmentation: read and resampled by MONAI, cut into patches for training."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import collectives
from .dicom import problem_of_series
from .errors import ConfigError, DataError, line_of, listing
from .schema import Config
from .seeded import seed_of
from .splits import Split, name_of
from .variation import Variation, as_tensor

Pair = tuple[Any, Any]  # where the image (or its channels, a tuple) and the mask are; None: there is no mask


@dataclass(frozen=True)
class Volumes:
    """A split of volumes with masks."""

    pairs: list[Pair]
    processor: VolumeProcessor
    labels: list[int] = field(default_factory=list)  # nothing: the masks are in `inputs`

    def __len__(self) -> int:
        return len(self.pairs)

    def length(self, index: int) -> int:
        return 0

    def inputs(self, indices: Sequence[int], draw: int | None = None) -> dict[str, Tensor]:
        """`image` [size, channels, *patch], `labels` [size, 1, *patch]; without `draw` *whole, of volumes of one shape."""
        if draw is None:
            found = [self.processor.whole(self.pairs[i]) for i in indices]
        else:
            found = [self.processor.patch(self.pairs[i], f"{draw}:{i}", vary=draw > 0) for i in indices]
        images, masks = zip(*found, strict=True)
        if masks[0] is None:
            return {"image": torch.stack(images)}
        return {"image": torch.stack(images), "labels": torch.stack(masks).long()}


class VolumeProcessor:
    """Reads pairs: axes in one order (RAS), voxels of one size, intensities normalised; patches of one size for training."""

    def __init__(self, config: Config) -> None:
        data = config.data
        self._seed, self._patch, self._classes = config.seed, list(data.patch), len(data.classes)
        self._found_in: dict[Pair, set[int]] = {}  # classes of each mask that was read
        self._kept: dict[Pair, tuple[Tensor, Tensor | None]] = {}
        self._cache, self._vary = data.cache, Variation(config)
        try:
            from monai import transforms as mt
            from monai.data import PILReader
        except ImportError as error:
            raise ConfigError("data.modality = 'volume' needs the package monai: pip install 'dcft_dist[monai]'") from error
        keys, may = ["image", "mask"], dict[str, Any](allow_missing_keys=True)  # to predict, no mask is needed
        load = mt.LoadImaged(keys, ensure_channel_first=True, image_only=True, **may)
        load.register(PILReader(reverse_indexing=False))  # rows first, as pre-trained models have seen images
        steps: list[Any] = [load]
        if len(data.patch) == 3:  # flat images have no orientation
            steps.append(mt.Orientationd(keys, "RAS", labels=(("L", "R"), ("P", "A"), ("I", "S")), **may))
        if data.spacing:
            steps.append(mt.Spacingd(keys, data.spacing, mode=("bilinear", "nearest"), **may))
        self._read: Any = mt.Compose(steps)
        # MONAI's readers keep what they read between two calls: in a thread of its own each reads by a copy of its own.
        self._readers: dict[int, Any] = {threading.get_ident(): self._read}
        if data.window:
            low, high = data.window
            self._scale: Any = mt.ScaleIntensityRanged("image", low, high, 0.0, 1.0, clip=True)
        else:
            self._scale = mt.NormalizeIntensityd("image", nonzero=True, channel_wise=True)
        self._bare: Any = mt.EnsureTyped(keys, track_meta=False, **may)
        self._back: Any = mt.Invertd("mask", self._read, "image")
        self._crop = mt.Compose(
            [
                mt.SpatialPadd(keys, self._patch),
                mt.RandCropByPosNegLabeld(keys, "mask", self._patch, pos=1, neg=1, num_samples=1),
            ]
        )

    def __call__(self, split: Split) -> Volumes:
        return Volumes(list(zip(split.inputs, split.labels, strict=True)), self, [0] * len(split))

    def whole(self, pair: Pair) -> tuple[Tensor, Tensor | None]:
        """Image [channels, *whole] and mask [1, *whole].

        Raises:
            DataError: a file cannot be read; image and mask do not lie on one grid; values are no numbers, or no classes.
        """
        if pair not in self._kept:
            found = self._found(pair)
            self._check_values(pair, found)
            found = self._bare(self._scale(found))
            image, mask = found["image"].float(), found.get("mask")
            if not self._cache or mask is None:  # without a mask: to be predicted, once
                return image, mask
            self._kept[pair] = image, mask.to(torch.uint8 if self._classes <= 256 else torch.int32)
        return self._kept[pair]

    def _found(self, pair: Pair) -> dict[str, Any]:
        channels, mask = _files_of(pair)
        places: dict[str, Any] = {"image": channels if len(channels) > 1 else channels[0]}
        if mask is not None:
            places["mask"] = mask
        try:
            return self._reader()(places)  # type: ignore[no-any-return]
        except Exception as error:  # each reader has its own
            names, why = " with ".join(filter(None, (*channels, mask))), error
            while isinstance(why.__cause__, Exception):  # MONAI says in which transform, and hides the reason
                why = why.__cause__
            raise DataError(f"{names}: cannot be read: {line_of(why, -1)}") from error

    def _reader(self) -> Any:
        thread = threading.get_ident()
        if thread not in self._readers:
            self._readers[thread] = copy.deepcopy(self._read)
        return self._readers[thread]

    def _check_values(self, pair: Pair, found: dict[str, Any]) -> None:
        """What was read, once it is turned, with the values that its files have; once for each pair."""
        if pair in self._found_in:
            return
        image, mask, name = found["image"], found.get("mask"), name_of(pair[0], "")
        good, (channels, _) = torch.isfinite(image).flatten(1).all(1).tolist(), _files_of(pair)
        if not all(good):
            bad = (
                [file for file, fine in zip(channels, good, strict=True) if not fine]
                if len(channels) == len(good)
                else [name]
            )
            raise DataError(f"{listing(bad)}: some of its voxels are no numbers (NaN or infinite)")
        if mask is None:
            return
        if image.shape[1:] != mask.shape[1:] or len(mask) != 1:
            raise DataError(f"{name} is {list(image.shape[1:])} once it is turned, and {pair[1]} {list(mask.shape)[1:]} "
                            f"with {len(mask)} channels")  # fmt: skip
        if not np.allclose(image.affine, mask.affine, atol=1e-2):
            raise DataError(f"{name} and {pair[1]} lie differently in space")
        if wrong := self._no_classes(mask):
            last = self._classes - 1
            raise DataError(f"{pair[1]}: labels {listing(wrong)}, but there are {self._classes} classes, 0 to {last}")
        self._found_in[pair] = {int(v) for v in torch.unique(mask)}

    def as_in_file(self, image: Any, classes: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
        """Classes [*whole] of a volume on the grid of its file, and the affine of that."""
        from monai.data import MetaTensor

        mask = MetaTensor(classes.unsqueeze(0).float().cpu())
        found = {**self._found((image, None)), "mask": mask}
        back = self._back(found)["mask"]
        kind = np.uint8 if self._classes <= 256 else np.uint16
        return back[0].numpy().round().astype(kind), np.asarray(back.affine, dtype=np.float64)

    def patch(self, pair: Pair, draw: str, vary: bool = True) -> tuple[Tensor, Tensor]:
        """Image [channels, *patch] and mask [1, *patch]: a random place, in half of the draws around a voxel of a structure.

        Raises:
            ConfigError: `data.transform` makes something else of it.
        """
        image, mask = self.whole(pair)
        self._crop.set_random_state(seed_of(self._seed, draw))
        found = self._crop({"image": image, "mask": mask})[0]
        image, mask = found["image"].as_tensor(), found["mask"].as_tensor()
        return self._varied(image, mask, draw) if vary and self._vary else (image, mask)

    def _varied(self, image: Tensor, mask: Tensor, draw: str) -> tuple[Tensor, Tensor]:
        # Draws of its own: those of the crop would make it a function of where that lies. Copies: volumes stay in memory.
        found = self._vary({"image": image.clone(), "mask": mask.clone()}, f"{draw}:transform")
        if not isinstance(found, dict) or not {"image", "mask"} <= found.keys():
            raise ConfigError("data.transform: it is to give a dictionary with image and mask, as it gets one")
        made = [as_tensor(found[key], before) for key, before in (("image", image), ("mask", mask))]
        if wrong := self._no_classes(made[1]):
            raise ConfigError(f"data.transform: the mask has values {listing(wrong)}: it is to be interpolated by nearest")
        return made[0].to(image.dtype), made[1].to(mask.dtype)

    def _no_classes(self, mask: Tensor) -> list[str]:
        """Values of a mask that are none of the classes."""
        found = [float(v) for v in torch.unique(mask)]
        return [f"{v:g}" for v in found if not (0 <= v < self._classes and v == round(v))]

    def check(self, splits: Sequence[Split], rank: int, ranks: int) -> None:
        """Compares image and mask of every pair, and reads both, each rank its part.

        Raises:
            DataError: grids differ, values are no numbers or no classes; the first are named.
        """
        pairs = [pair for split in splits for pair in zip(split.inputs, split.labels, strict=True)][rank::ranks]
        with ThreadPoolExecutor() as threads:
            wrong = [text for text in threads.map(self._problem, pairs) if text]
        if wrong:
            raise DataError(f"{len(wrong)} of {len(pairs)} volumes: {listing(wrong, 3)}")
        if (
            pairs and pairs[0][1] is not None and len(splits) > 1 and self._vary
        ):  # before the run, not when others are predicted
            self.patch(pairs[0], "check")

    def check_classes(self, train: Split, names: Sequence[str]) -> None:
        """After `check`. Collective.

        Raises:
            DataError: a class, the background excepted, is in no training mask.
        """
        there = set[int]().union(*(self._found_in.get(pair, ()) for pair in zip(train.inputs, train.labels, strict=True)))
        counts = collectives.reduce_numbers([int(i in there) for i in range(len(names))], what="classes of the masks")
        if absent := [name for name, count in zip(names[1:], counts[1:], strict=True) if not count]:
            raise DataError(f"no training mask has {listing(absent)}: leave it out of data.classes, or split otherwise")

    def _problem(self, pair: Pair) -> str | None:
        try:
            channels, mask = _files_of(pair)
            files = [Path(place) for place in (*channels, mask) if place is not None]
            for place in files:
                if place.is_dir() and (text := problem_of_series(place)):
                    return text
            for other in files[1:]:
                if text := different_grids(files[0], other):
                    return text
            self.whole(pair)
        except DataError as error:
            return str(error)
        return None

    def save(self, folder: Path) -> None:
        return None


def _files_of(pair: Pair) -> tuple[list[str], str | None]:
    """Of the channels, and of the mask."""
    image, mask = pair
    return [str(place) for place in (image if isinstance(image, tuple) else (image,))], None if mask is None else str(mask)


def different_grids(first: Path, second: Path) -> str | None:
    """How the grids of two NIfTI files differ; None: they do not, or these are other files."""
    if not all(file.name.endswith((".nii", ".nii.gz")) for file in (first, second)):
        return None
    import nibabel

    try:
        one, two = (_header_of(nibabel.load(file)) for file in (first, second))
    except Exception as error:
        raise DataError(f"{first} with {second}: cannot be read: {line_of(error, -1)}") from error
    if one[0] != two[0]:
        return f"{first} is {one[0]} and {second} {two[0]}"
    if not np.allclose(one[1], two[1], atol=1e-3):
        sizes = [np.round(np.linalg.norm(affine[:3, :3], axis=0), 3).tolist() for _, affine in (one, two)]
        return f"{first} and {second} lie differently in space (voxels {sizes[0]} and {sizes[1]} mm)"
    return None


def _header_of(image: Any) -> tuple[list[int], Any]:
    return list(image.shape[:3]), image.affine
