"""Reads volumes and masks with MONAI: one orientation, one voxel size, one intensity scale, one grid."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config.schema import Config
from ..errors import ConfigError, DataError, line_of, listing
from .dicom import problem_of_series
from .splits import name_of

Pair = tuple[Any, Any]  # path of the image (or a tuple of paths, its channels), path of the mask (None: there is no mask)


class VolumeReader:
    """Reads pairs of image and mask: axes in the order RAS, voxels of one size, normalised intensities."""

    def __init__(self, config: Config) -> None:
        """
        Raises:
            ConfigError: the package monai is not installed.
        """
        data = config.data
        self._num_classes, self._cache = len(data.classes), data.cache
        self._classes_in: dict[Pair, set[int]] = {}  # classes of each mask that was read
        self._cached: dict[Pair, tuple[Tensor, Tensor | None]] = {}
        try:
            from monai import transforms as mt
            from monai.data import PILReader
        except ImportError as error:
            raise ConfigError("data.modality = 'volume' needs the package monai: pip install 'dcft_dist[monai]'") from error
        keys, optional = ["image", "mask"], dict[str, Any](allow_missing_keys=True)  # a prediction needs no mask
        load = mt.LoadImaged(keys, ensure_channel_first=True, image_only=True, **optional)
        load.register(PILReader(reverse_indexing=False))  # rows first, as pre-trained models have seen images
        steps: list[Any] = [load]
        if len(data.patch) == 3:  # flat images have no orientation
            steps.append(mt.Orientationd(keys, "RAS", labels=(("L", "R"), ("P", "A"), ("I", "S")), **optional))
        if data.spacing:
            steps.append(mt.Spacingd(keys, data.spacing, mode=("bilinear", "nearest"), **optional))
        self._read: Any = mt.Compose(steps)
        # MONAI's readers keep what they read between two calls, so each thread needs a copy of its own.
        self._readers: dict[int, Any] = {threading.get_ident(): self._read}
        if data.window:
            low, high = data.window
            self._scale: Any = mt.ScaleIntensityRanged("image", low, high, 0.0, 1.0, clip=True)
        else:
            self._scale = mt.NormalizeIntensityd("image", nonzero=True, channel_wise=True)
        self._without_meta: Any = mt.EnsureTyped(keys, track_meta=False, **optional)
        self._back: Any = mt.Invertd("mask", self._read, "image")

    def whole(self, pair: Pair) -> tuple[Tensor, Tensor | None]:
        """Image [channels, *whole] and mask [1, *whole].

        Raises:
            DataError: a file cannot be read; image and mask are on different grids; values are not finite, or no classes.
        """
        if pair not in self._cached:
            volume = self._read_files(pair)
            self._check_values(pair, volume)
            volume = self._without_meta(self._scale(volume))
            image, mask = volume["image"].float(), volume.get("mask")
            if not self._cache or mask is None:  # a volume without a mask is read once, to be predicted
                return image, mask
            self._cached[pair] = image, mask.to(torch.uint8 if self._num_classes <= 256 else torch.int32)
        return self._cached[pair]

    def as_in_file(self, image: Any, classes: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
        """Classes [*whole] of a volume on the grid of its file, and the affine of that grid."""
        from monai.data import MetaTensor

        mask = MetaTensor(classes.unsqueeze(0).float().cpu())
        volume = {**self._read_files((image, None)), "mask": mask}
        restored = self._back(volume)["mask"]
        dtype = np.uint8 if self._num_classes <= 256 else np.uint16
        return restored[0].numpy().round().astype(dtype), np.asarray(restored.affine, dtype=np.float64)

    def classes_in(self, pairs: Sequence[Pair]) -> set[int]:
        """Classes that occur in those masks of `pairs` that were read."""
        return set[int]().union(*(self._classes_in.get(pair, ()) for pair in pairs))

    def stray_values(self, mask: Tensor) -> list[str]:
        """Values of a mask that are none of the classes."""
        values = [float(v) for v in torch.unique(mask)]
        return [f"{v:g}" for v in values if not (0 <= v < self._num_classes and v == round(v))]

    def problem(self, pair: Pair) -> str | None:
        """What is wrong with the files of a pair; None if nothing is."""
        try:
            channels, mask = files_of(pair)
            files = [Path(file) for file in (*channels, mask) if file is not None]
            for file in files:
                if file.is_dir() and (text := problem_of_series(file)):
                    return text
            for other in files[1:]:
                if text := different_grids(files[0], other):
                    return text
            self.whole(pair)
        except DataError as error:
            return str(error)
        return None

    def _read_files(self, pair: Pair) -> dict[str, Any]:
        channels, mask = files_of(pair)
        files: dict[str, Any] = {"image": channels if len(channels) > 1 else channels[0]}
        if mask is not None:
            files["mask"] = mask
        try:
            return self._reader()(files)  # type: ignore[no-any-return]
        except Exception as error:  # each reader raises its own kinds
            names, reason = " with ".join(filter(None, (*channels, mask))), error
            while isinstance(reason.__cause__, Exception):  # MONAI names the transform and hides the reason
                reason = reason.__cause__
            raise DataError(f"{names}: cannot be read: {line_of(reason, -1)}") from error

    def _reader(self) -> Any:
        thread = threading.get_ident()
        if thread not in self._readers:
            self._readers[thread] = copy.deepcopy(self._read)
        return self._readers[thread]

    def _check_values(self, pair: Pair, volume: dict[str, Any]) -> None:
        """Checks image and mask after reorientation, once for each pair: finite values, one grid, known classes."""
        if pair in self._classes_in:
            return
        image, mask, name = volume["image"], volume.get("mask"), name_of(pair[0], "")
        finite, (channels, _) = torch.isfinite(image).flatten(1).all(1).tolist(), files_of(pair)
        if not all(finite):
            bad = [name]
            if len(channels) == len(finite):
                bad = [file for file, good in zip(channels, finite, strict=True) if not good]
            raise DataError(f"{listing(bad)}: some of its voxels are no numbers (NaN or infinite)")
        if mask is None:
            return
        if image.shape[1:] != mask.shape[1:] or len(mask) != 1:
            raise DataError(
                f"{name} is {list(image.shape[1:])} once it is turned, and {pair[1]} {list(mask.shape)[1:]} "
                f"with {len(mask)} channels"
            )
        if not np.allclose(image.affine, mask.affine, atol=1e-2):
            raise DataError(f"{name} and {pair[1]} lie differently in space")
        if wrong := self.stray_values(mask):
            last = self._num_classes - 1
            raise DataError(f"{pair[1]}: labels {listing(wrong)}, but there are {self._num_classes} classes, 0 to {last}")
        self._classes_in[pair] = {int(v) for v in torch.unique(mask)}


def check_all(pairs: Sequence[Pair], problem: Callable[[Pair], str | None]) -> None:
    """Runs `problem` on every pair, in threads.

    Raises:
        DataError: some pairs have one; the first three are named.
    """
    with ThreadPoolExecutor() as threads:
        wrong = [text for text in threads.map(problem, pairs) if text]
    if wrong:
        raise DataError(f"{len(wrong)} of {len(pairs)} volumes: {listing(wrong, 3)}")


def files_of(pair: Pair) -> tuple[list[str], str | None]:
    """Paths of the channels, and of the mask."""
    image, mask = pair
    return [str(file) for file in (image if isinstance(image, tuple) else (image,))], None if mask is None else str(mask)


def different_grids(first: Path, second: Path) -> str | None:
    """How the grids of two NIfTI files differ; None if they agree, or if these are other files."""
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
    """Shape and affine of a NIfTI image."""
    return list(image.shape[:3]), image.affine
