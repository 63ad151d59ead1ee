"""Segmentation masks from a finished run's model: one file for each volume or image, on the grid of that image."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.batches import evaluation_batches
from ..data.splits import Split, name_of
from ..data.volumes import VolumeProcessor
from ..distributed import collectives
from ..errors import ConfigError, DataError, listing
from ..files import write_atomic
from ..train.task_model import TaskModel, gather_rows
from .load import identify, read_examples


@torch.no_grad()
def write_masks(adapted: TaskModel, split: Split, folder: Path | None) -> dict[str, list[Any]]:
    """Segments each image and writes its mask: `.nii.gz` for volumes, `.png` for flat images. Collective.

    Args:
        adapted: the finished run's model.
        split: the images.
        folder: folder for the masks.

    Returns:
        Columns of a table: input, group, file of the mask, and the extent of each class except the background: millilitres
        for volumes, pixels for flat images.

    Raises:
        ConfigError: `folder` is None.
        DataError: an image cannot be read, or the file of a mask exists already.
    """
    processor, world, names = adapted.pretrained.processor, adapted.world, adapted.facts["names"]
    if folder is None or not isinstance(processor, VolumeProcessor):
        raise ConfigError("predictions of a segmentation are masks: say where they go, --masks FOLDER")
    deep = len(adapted.config.data.patch) == 3
    examples, files, sizes = read_examples(adapted, split), _files(split, folder, deep), list[list[float]]()
    with collectives.agreed("write the masks"):
        if existing := [str(file) for file in files if file.exists()]:
            raise DataError(f"{listing(existing, 3)} would be overwritten: give another folder with --masks")
    adapted.model.eval()
    for batch in evaluation_batches(examples, world.rank, world.world_size, 1, world.device):
        scores = adapted.whole(batch)
        with collectives.agreed("write the masks"):
            for i in batch["index"][batch["real"]].tolist():
                mask, affine = processor.reader.as_in_file(split.inputs[i], scores[0].argmax(0))
                write_atomic(files[i], _nifti(mask, affine) if mask.ndim == 3 else _png(mask))
                voxel = abs(float(np.linalg.det(affine[:3, :3]))) / 1000 if mask.ndim == 3 else 1.0
                counts = np.bincount(mask.ravel(), minlength=len(names))
                sizes.append([i, *(float(n) * voxel for n in counts[1:])])
    rows = gather_rows(torch.tensor(sizes, dtype=torch.float64).view(-1, len(names)))
    rows = rows[rows[:, 0].argsort()]
    indices, volumes = rows[:, 0].long().tolist(), rows[:, 1:].T.tolist()
    unit = "ml" if deep else "pixels"
    extent = {f"{unit}({name})": [round(v, 6) for v in values] for name, values in zip(names[1:], volumes, strict=True)}
    return {**identify(split, indices), "mask": [str(files[i]) for i in indices], **extent}


def _files(split: Split, folder: Path, deep: bool) -> list[Path]:
    """The file of each mask, named after its image. If two images have the same name, all names start with a number."""
    names = [Path(name_of(source, "")).name.removesuffix(".gz") for source in split.inputs]
    stems = [name.removesuffix(".nii") if deep else Path(name).stem for name in names]
    if len(set(stems)) < len(stems):
        stems = [f"{i:05d}_{stem}" for i, stem in enumerate(stems)]
    return [folder / f"{stem}_mask{'.nii.gz' if deep else '.png'}" for stem in stems]


def _nifti(mask: NDArray[Any], affine: NDArray[Any]) -> bytes:
    import nibabel

    return gzip.compress(nibabel.Nifti1Image(mask, affine).to_bytes(), mtime=0)  # the same bytes every time


def _png(mask: NDArray[Any]) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(mask).save(file, "png")
    return file.getvalue()
