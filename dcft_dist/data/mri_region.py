"""Region of the brain from a patch of an MRI slice: trained on one brain (Colin27), tested on an average of 152 (MNI152).

Axial patches of 64 x 64 mm around a voxel of the AAL atlas, whose 116 regions fall into eight groups by the first digit of
their code. Colin27 and the atlas come with Debian's mricron-data, the MNI152 T1 with nilearn; both are in MNI space, in
voxels of 1 mm. Every fifth slab of 12 mm of Colin27 validates; centres within 3 mm of another slab are left out.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config.task import Task
from ..errors import DataError
from ..packages import mricron_file, nilearn_file
from .splits import Split, TaskData, draw_of

NAMES = ["frontal", "insula", "limbic", "occipital", "parietal", "deep grey", "temporal", "cerebellum"]


_SIDE = 64  # mm, and pixels


_SLAB, _GAP = 12, 3  # mm


_CUBE = 20  # mm: patches whose centres lie in one cube are a group


def mri_region(task: Task) -> TaskData:
    """
    Raises:
        DataError: nibabel, nilearn's or mricron's files are not installed, or are not what they should be.
    """
    atlas, origin = _volume(mricron_file("aal.nii.gz"))
    groups = _region_groups(mricron_file("aal.nii.txt"))[atlas]
    colin, same = _volume(mricron_file("ch2bet.nii.gz"))
    mni, other = _volume(nilearn_file("mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"))
    if colin.shape != atlas.shape or origin != same:
        raise DataError("ch2bet.nii.gz and aal.nii.gz of mricron-data have different grids")
    shift = [a - b for a, b in zip(origin, other, strict=True)]  # of an atlas voxel in the other volume
    slabs = np.arange(atlas.shape[2]) // _SLAB
    inside = np.minimum(np.arange(atlas.shape[2]) % _SLAB, _SLAB - 1 - np.arange(atlas.shape[2]) % _SLAB) >= _GAP
    places = {
        "train": (slabs % 5 != 2) & inside,
        "validation": (slabs % 5 == 2) & inside,
        "test": np.ones(atlas.shape[2], bool),
    }
    sizes = {"train": task.train_per_class, "validation": task.validation_per_class, "test": task.test_per_class}
    splits = {}
    for name, slices in places.items():
        centres = _centres(groups, slices, sizes[name], random.Random(draw_of(task, name)))
        volume, move = (mni, shift) if name == "test" else (colin, [0, 0, 0])
        splits[name] = _split(volume, groups, centres, move)
    caveat = "Two brains, labels from an atlas: it is anatomy, not diagnosis."
    return TaskData.of(NAMES, splits, caveat)


def _volume(file: Path) -> tuple[NDArray[Any], list[int]]:
    """Values, and the position of the first voxel in mm."""
    try:
        import nibabel
    except ImportError as error:
        raise DataError("the task mri_region needs the package nibabel: pip install nibabel") from error
    try:
        image: Any = nibabel.load(file)
        values = np.asanyarray(image.dataobj)
    except (OSError, EOFError, nibabel.filebasedimages.ImageFileError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    if not np.array_equal(image.affine[:3, :3], np.eye(3)):
        raise DataError(f"{file} has voxels other than 1 mm")
    return values, [int(v) for v in image.affine[:3, 3]]


def _region_groups(file: Path) -> NDArray[np.int64]:
    """Region number -> group (-1: none)."""
    codes = {int(words[0]): words[2] for words in map(str.split, file.read_text().splitlines()) if len(words) == 3}
    found = np.full(256, -1, np.int64)
    for number, code in codes.items():
        found[number] = int(code[0]) - 2
    return found


def _centres(groups: NDArray[Any], slices: NDArray[Any], number: int, draw: random.Random) -> list[tuple[int, int, int]]:
    """As many voxels of each group, in the slices given, at least half a patch from the border."""
    half, allowed = _SIDE // 2, np.zeros(groups.shape, bool)
    allowed[half:-half, half:-half, slices] = True
    found: list[tuple[int, int, int]] = []
    for group in range(len(NAMES)):
        voxels = np.argwhere((groups == group) & allowed)
        if len(voxels) < number:
            raise DataError(f"only {len(voxels)} patches of class {NAMES[group]!r}, not {number}: lower task.*_per_class")
        found += [tuple(int(x) for x in voxels[i]) for i in draw.sample(range(len(voxels)), number)]  # type: ignore[misc]
    return found


def _split(volume: NDArray[Any], groups: NDArray[Any], centres: list[tuple[int, int, int]], move: list[int]) -> Split:
    half, top = _SIDE // 2, float(np.quantile(volume[volume > 0], 0.995))
    patches = np.zeros((len(centres), _SIDE, _SIDE), np.uint8)
    for patch, (x, y, z) in zip(patches, centres, strict=True):
        a, b, c = x + move[0], y + move[1], z + move[2]
        values = volume[a - half : a + half, b - half : b + half, c] / top * 255
        patch[:] = np.clip(values, 0, 255).T[::-1]  # front up, as radiologists see it
    labels = [int(groups[centre]) for centre in centres]
    # One group for both halves: the MNI152 is symmetric, and any brain nearly so.
    places = [(abs(x - groups.shape[0] // 2), y, z) for x, y, z in centres]
    return Split(patches, labels, ["-".join(str(v // _CUBE) for v in place) for place in places])
