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
from ..errors import ConfigError, DataError, counted, line_of, listing
from .dicom import problem_of_series
from .monai_readers import loader
from .pictures import plain_channels, plain_mask
from .splits import name_of
from .understood import as_rgb, stretched

Pair = tuple[Any, Any]  # path of the image (several channels: a tuple of paths), path of the mask (None: no mask)


class VolumeReader:
    """Reads pairs of image and mask, and brings them into one form.

    The axes of 3-D volumes get the order RAS, voxels get the size `data.spacing`. Intensities in `data.window` are scaled to
    [0, 1]. Without a window, each channel gets mean 0 and deviation 1.
    """

    def __init__(self, config: Config) -> None:
        """Builds MONAI's transforms.

        Raises:
            ConfigError: the package monai is not installed.
        """
        data = config.data
        self._num_classes, self._cache = len(data.classes), data.cache
        self._classes_in: dict[Pair, set[int]] = {}  # classes in each mask read so far
        self._channels = 0  # of the first image
        self._cached: dict[Pair, tuple[Tensor, Tensor | None]] = {}
        try:
            from monai import transforms as mt
        except ImportError as error:
            raise ConfigError("data.modality = 'volume' needs the package monai: pip install 'dcft_dist[monai]'") from error
        keys, optional = ["image", "mask"], dict[str, Any](allow_missing_keys=True)  # a prediction needs no mask
        steps: list[Any] = [loader("image", plain_channels), loader("mask", plain_mask)]
        if len(data.patch) == 3:  # 2-D images have no orientation
            steps.append(mt.Orientationd(keys, "RAS", labels=(("L", "R"), ("P", "A"), ("I", "S")), **optional))
        if data.spacing:
            steps.append(mt.Spacingd(keys, data.spacing, mode=("bilinear", "nearest"), **optional))
        self._read: Any = mt.Compose(steps)
        # MONAI's readers keep state between two calls, so each thread needs its own copy.
        self._readers: dict[int, Any] = {threading.get_ident(): self._read}
        if data.window:
            low, high = data.window
            self._scale: Any = mt.ScaleIntensityRanged("image", low, high, 0.0, 1.0, clip=True)
        else:
            self._scale = mt.NormalizeIntensityd("image", channel_wise=True)
        self._without_meta: Any = mt.EnsureTyped(keys, track_meta=False, **optional)
        self._back: Any = mt.Invertd("mask", self._read, "image")

    def whole(self, pair: Pair) -> tuple[Tensor, Tensor | None]:
        """Reads a whole volume.

        Args:
            pair: paths of image and mask.

        Returns:
            Image [channels, *whole] and mask [1, *whole]; None instead of the mask if the pair has none.

        Raises:
            DataError: a file cannot be read, or image and mask are on different grids. Or the image has values that are NaN
                or infinite, or the mask has values that are not classes.
        """
        if pair not in self._cached:
            volume = self._read_files(pair)
            self._check_values(pair, volume)
            volume = self._without_meta(self._scale(volume))
            image, mask = volume["image"].float(), volume.get("mask")
            if not self._cache or mask is None:  # volumes without masks are predicted, and so read only once
                return image, mask
            self._cached[pair] = image, mask.to(torch.uint8 if self._num_classes <= 256 else torch.int32)
        return self._cached[pair]

    def as_in_file(self, image: Any, classes: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
        """Brings predicted classes back to the grid of the image's file.

        Args:
            image: path of the image, or a tuple of paths.
            classes: [*whole], on the grid that `whole` returns.

        Returns:
            Classes on the grid of the file (uint8, or uint16 with more than 256 classes), and the affine of that grid.
        """
        from monai.data import MetaTensor

        mask = MetaTensor(classes.unsqueeze(0).float().cpu())
        volume = {**self._read_files((image, None)), "mask": mask}
        restored = self._back(volume)["mask"]
        dtype = np.uint8 if self._num_classes <= 256 else np.uint16
        return restored[0].numpy().round().astype(dtype), np.asarray(restored.affine, dtype=np.float64)

    def classes_in(self, pairs: Sequence[Pair]) -> set[int]:
        """Returns the classes that occur in the masks of `pairs` read so far."""
        return set[int]().union(*(self._classes_in.get(pair, ()) for pair in pairs))

    def stray_values(self, mask: Tensor) -> list[str]:
        """Returns the values of a mask that are not classes."""
        values = [float(v) for v in torch.unique(mask)]
        return [f"{v:g}" for v in values if not (0 <= v < self._num_classes and v == round(v))]

    def problem(self, pair: Pair) -> str | None:
        """Reads a pair and describes what is wrong with its files; None if nothing is."""
        try:
            channels, mask = files_of(pair)
            files = [Path(file) for file in (*channels, mask) if file is not None]
            for file in files:
                if file.is_dir() and (text := problem_of_series(file)):
                    return text
            for file in files[1:]:
                if text := different_grids(files[0], file):
                    return text
            self.whole(pair)
        except DataError as error:
            return str(error)
        return None

    def described(self, pair: Pair) -> str:
        """Size, voxel size and orientation as stored, range of each channel, number of voxels of each class in the mask."""
        volume = self._read_files(pair)
        image, mask = volume["image"], volume.get("mask")
        stored, form = np.asarray(image.meta["original_affine"]), list(image.meta["spatial_shape"])
        ranges = [f"{float(channel.min()):g} to {float(channel.max()):g}" for channel in image]
        text = f"{_times(form)} voxels"
        if image.ndim == 4:
            text += f" of {_times(np.round(np.linalg.norm(stored[:3, :3], axis=0), 3))} mm, axes {_axes(stored)}"
        text += f", {counted(len(image), 'channel')} from {', '.join(ranges)}; for the model {_times(image.shape[1:])}"
        if image.ndim == 4:
            text += f" of {_times(np.round(np.linalg.norm(np.asarray(image.affine)[:3, :3], axis=0), 3))} mm, axes RAS"
        if mask is not None:
            classes, counts = torch.unique(mask, return_counts=True)
            text += "; mask " + ", ".join(f"{c:g}: {n}" for c, n in zip(classes.tolist(), counts.tolist(), strict=True))
        return text

    def drawn(self, pair: Pair, predicted: NDArray[Any] | None = None) -> NDArray[np.uint8]:
        """The middle slices along the three axes, the class of the mask in colour: [height, width, 3].

        Args:
            pair: paths of image and mask.
            predicted: another mask [*space], to compare: those slices are drawn in which most voxels differ, once with the
                first mask, and below with this one.
        """
        image, mask = self.whole(pair)
        values, classes = stretched(image[0].numpy()), None if mask is None else mask[0].numpy()
        at = [n // 2 for n in values.shape]
        if predicted is None or classes is None:
            return _row_of(values, classes, at)
        differ, axes = predicted != classes, range(values.ndim)
        at = [int(differ.sum(tuple(other for other in axes if other != axis)).argmax()) for axis in axes]
        given = np.pad(_row_of(values, classes, at), ((0, 2), (0, 0), (0, 0)))
        return np.concatenate([given, _row_of(values, predicted, at)], axis=0)

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
        self._channels = self._channels or len(image)
        if len(image) != self._channels:
            raise DataError(f"{name} has {len(image)} channels, but other volumes {self._channels}")
        finite, (channels, _) = torch.isfinite(image).flatten(1).all(1).tolist(), files_of(pair)
        if not all(finite):
            broken = [name]
            if len(channels) == len(finite):
                broken = [file for file, is_finite in zip(channels, finite, strict=True) if not is_finite]
            raise DataError(f"{listing(broken)}: some voxels are NaN or infinite")
        if mask is None:
            return
        if image.shape[1:] != mask.shape[1:] or len(mask) != 1:
            raise DataError(
                f"{name} has shape {list(image.shape[1:])} after reorientation, but {pair[1]} {list(mask.shape)[1:]} with "
                f"{len(mask)} channels: image and mask need one shape, the mask one channel"
            )
        if not np.allclose(image.affine, mask.affine, atol=1e-2):
            raise DataError(f"{name} and {pair[1]} have different affines: image and mask need one grid")
        if strays := self.stray_values(mask):
            last = self._num_classes - 1
            raise DataError(f"{pair[1]}: labels {listing(strays)}, but there are {self._num_classes} classes, 0 to {last}")
        self._classes_in[pair] = {int(v) for v in torch.unique(mask)}


def _row_of(values: NDArray[Any], classes: NDArray[Any] | None, at: Sequence[int]) -> NDArray[np.uint8]:
    """The slices number `at` of a volume along its axes, side by side; or the one image."""
    slices = [slice(None)] if values.ndim == 2 else [(slice(None),) * axis + (i,) for axis, i in enumerate(at)]
    drawn = [_drawn(values[part], None if classes is None else classes[part]) for part in slices]
    height = max(plane.shape[0] for plane in drawn)
    return np.concatenate([np.pad(plane, ((0, height - plane.shape[0]), (0, 2), (0, 0))) for plane in drawn], axis=1)


def _times(numbers: Any) -> str:
    return " x ".join(f"{float(number):g}" for number in numbers)


def _axes(affine: NDArray[Any]) -> str:
    """The direction of each stored axis: R(ight), A(nterior), S(uperior), or the opposite."""
    import nibabel

    return "".join(str(code) for code in nibabel.aff2axcodes(affine))


def _drawn(plane: NDArray[Any], mask: NDArray[Any] | None) -> NDArray[np.uint8]:
    """One slice with the second axis upwards, the structures of its mask in red, green and so on."""
    grey = as_rgb(plane.T[::-1])
    if mask is None:
        return grey
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255], [0, 255, 255]])
    turned = mask.T[::-1].astype(int)
    mixed: NDArray[np.uint8] = (0.6 * grey + 0.4 * colours[np.where(turned, (turned - 1) % 6 + 1, 0)]).astype(np.uint8)
    return np.where((turned > 0)[:, :, None], mixed, grey)


def check_all(pairs: Sequence[Pair], problem: Callable[[Pair], str | None]) -> None:
    """Checks every pair, in threads.

    Args:
        pairs: paths of image and mask.
        problem: describes what is wrong with a pair; None if nothing is.

    Raises:
        DataError: some pairs have a problem; the message describes the first three.
    """
    with ThreadPoolExecutor() as threads:
        problems = [text for text in threads.map(problem, pairs) if text]
    if problems:
        raise DataError(
            f"{len(problems)} of {len(pairs)} volumes cannot be used: {listing(problems, 3)}. Replace or remove them"
        )


def files_of(pair: Pair) -> tuple[list[str], str | None]:
    """Returns the paths of an image's channels, and the path of its mask (None: no mask)."""
    image, mask = pair
    return [str(file) for file in (image if isinstance(image, tuple) else (image,))], None if mask is None else str(mask)


def different_grids(first: Path, second: Path) -> str | None:
    """Compares the grids of two NIfTI files.

    Returns:
        A description of the difference; None if the grids agree, or if a file is not NIfTI.

    Raises:
        DataError: a file cannot be read.
    """
    if not all(file.name.endswith((".nii", ".nii.gz")) for file in (first, second)):
        return None
    import nibabel

    try:
        (first_shape, first_affine), (second_shape, second_affine) = (
            _header_of(nibabel.load(file)) for file in (first, second)
        )
    except Exception as error:
        raise DataError(f"{first} with {second}: cannot be read: {line_of(error, -1)}") from error
    if first_shape != second_shape:
        return f"{first} has shape {first_shape}, but {second} {second_shape}"
    if not np.allclose(first_affine, second_affine, atol=1e-3):
        affines = (first_affine, second_affine)
        sizes = [np.round(np.linalg.norm(affine[:3, :3], axis=0), 3).tolist() for affine in affines]
        return f"{first} and {second} have different affines (voxels {sizes[0]} and {sizes[1]} mm)"
    return None


def _header_of(image: Any) -> tuple[list[int], Any]:
    """Returns shape and affine of a NIfTI image."""
    return list(image.shape[:3]), image.affine
