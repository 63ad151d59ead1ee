"""The task `mri_region`: predict the region of the brain from a patch of an MRI slice.

The model trains on one brain (Colin27) and is tested on an average of 152 brains (MNI152). Inputs are axial patches of
64 x 64 mm around a voxel of the AAL atlas. The first digit of a region's code sorts the 116 regions into eight groups, the
classes. Colin27 and the atlas come with Debian's mricron-data, the MNI152 T1 with nilearn. Both are in MNI space, in voxels
of 1 mm. Every fifth slab of 12 mm of Colin27 is for validation. Centres within 3 mm of another slab are left out.
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

_SIDE = 64  # side of a patch in mm, which is also its number of pixels
_SLAB, _GAP = 12, 3  # mm
_CUBE = 20  # mm: patches with centres in one cube form a group


def mri_region(task: Task) -> TaskData:
    """Loads the task.

    Args:
        task: numbers of examples per class, and seeds.

    Raises:
        DataError: nibabel or the files of nilearn or mricron are not installed. Or the files have unexpected grids or
            voxels, or a class has too few patches.
    """
    atlas, origin = _volume(mricron_file("aal.nii.gz"))
    groups = _region_groups(mricron_file("aal.nii.txt"))[atlas]
    colin, colin_origin = _volume(mricron_file("ch2bet.nii.gz"))
    mni, mni_origin = _volume(nilearn_file("mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"))
    if colin.shape != atlas.shape or origin != colin_origin:
        raise DataError("ch2bet.nii.gz and aal.nii.gz of mricron-data have different grids")
    shift = [a - b for a, b in zip(origin, mni_origin, strict=True)]  # from an atlas voxel to the MNI152's voxel
    slabs = np.arange(atlas.shape[2]) // _SLAB
    inside = np.minimum(np.arange(atlas.shape[2]) % _SLAB, _SLAB - 1 - np.arange(atlas.shape[2]) % _SLAB) >= _GAP
    slices_of = {
        "train": (slabs % 5 != 2) & inside,
        "validation": (slabs % 5 == 2) & inside,
        "test": np.ones(atlas.shape[2], bool),
    }
    sizes = {"train": task.train_per_class, "validation": task.validation_per_class, "test": task.test_per_class}
    splits = {}
    for name, slices in slices_of.items():
        centres = _centres(groups, slices, sizes[name], random.Random(draw_of(task, name)))
        volume, offset = (mni, shift) if name == "test" else (colin, [0, 0, 0])
        splits[name] = _split(volume, groups, centres, offset)
    caveat = "Two brains, labels from an atlas: it is anatomy, not diagnosis."
    return TaskData.of(NAMES, splits, caveat)


def _volume(file: Path) -> tuple[NDArray[Any], list[int]]:
    """Returns the values, and the position of the first voxel in mm."""
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
        raise DataError(f"{file}: the voxels are not 1 mm along each axis")
    return values, [int(v) for v in image.affine[:3, 3]]


def _region_groups(file: Path) -> NDArray[np.int64]:
    """Returns the group of each region number; -1: none."""
    codes = {int(words[0]): words[2] for words in map(str.split, file.read_text().splitlines()) if len(words) == 3}
    groups = np.full(256, -1, np.int64)
    for number, code in codes.items():
        groups[number] = int(code[0]) - 2
    return groups


def _centres(groups: NDArray[Any], slices: NDArray[Any], number: int, draw: random.Random) -> list[tuple[int, int, int]]:
    """Draws `number` voxels of each group from the slices, at least half a patch away from the border."""
    half, allowed = _SIDE // 2, np.zeros(groups.shape, bool)
    allowed[half:-half, half:-half, slices] = True
    centres: list[tuple[int, int, int]] = []
    for group in range(len(NAMES)):
        voxels = np.argwhere((groups == group) & allowed)
        if len(voxels) < number:
            raise DataError(f"class {NAMES[group]!r} has only {len(voxels)} patches, not {number}: lower task.*_per_class")
        centres += [tuple(int(x) for x in voxels[i]) for i in draw.sample(range(len(voxels)), number)]  # type: ignore[misc]
    return centres


def _split(volume: NDArray[Any], groups: NDArray[Any], centres: list[tuple[int, int, int]], offset: list[int]) -> Split:
    """Cuts the patches out of a volume. `offset`: from an atlas voxel to the voxel of the volume."""
    half, white = _SIDE // 2, float(np.quantile(volume[volume > 0], 0.995))
    patches = np.zeros((len(centres), _SIDE, _SIDE), np.uint8)
    for patch, (x, y, z) in zip(patches, centres, strict=True):
        a, b, c = x + offset[0], y + offset[1], z + offset[2]
        values = volume[a - half : a + half, b - half : b + half, c] / white * 255
        patch[:] = np.clip(values, 0, 255).T[::-1]  # front up, as radiologists view slices
    labels = [int(groups[centre]) for centre in centres]
    # Mirrored places share a group: the MNI152 is symmetric, and any brain nearly so.
    positions = [(abs(x - groups.shape[0] // 2), y, z) for x, y, z in centres]
    return Split(patches, labels, ["-".join(str(v // _CUBE) for v in position) for position in positions])
