"""Volumes from DICOM: slices in the order of their positions, on a grid that is compared with the one the files state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dicom import is_dicom, positions_along_normal, problem_of_slices


def series_reader() -> Any:
    """A reader for MONAI's `LoadImage`, for folders with a DICOM series and for single DICOM files.

    MONAI's own stacks slices by InstanceNumber, leaves out those without one, and takes the identity for the grid of files
    with several frames. This one stacks by ImagePositionPatient (DICOM PS3.3 C.7.6.2), and refuses what has no clear order.

    Returns:
        The reader. It raises ValueError, which says what is wrong with the files.
    """
    from monai.data import PydicomReader

    class SeriesReader(PydicomReader):
        def verify_suffix(self, filename: Any) -> bool:
            files = [filename] if isinstance(filename, str | Path) else list(filename)
            return all(Path(file).is_dir() or is_dicom(Path(file)) for file in files)

        def read(self, data: Any, **options: Any) -> Any:
            found = super().read(data, **options)
            folders: Any = self.filenames  # MONAI has put the names of the slices in the place of each folder
            for series, names in zip(self._series(found), folders, strict=False):
                if problem := problem_of_slices(Path(names[0]).parent, [Path(name).name for name in names], series):
                    raise ValueError(problem)
                for number, i in enumerate(np.argsort(positions_along_normal(series)), 1):
                    series[i].InstanceNumber = number
            return found

        def get_data(self, data: Any) -> Any:
            series = self._series(data)
            alone = data if isinstance(data, list) else [data]
            for one in [header for slices in series for header in slices] or alone:
                if (kind := str(one.get("PhotometricInterpretation"))) in ("MONOCHROME1", "PALETTE COLOR"):
                    raise ValueError(f"its numbers are {kind}, not brightness: convert them, or use data.modality = 'image'")
            if not series:
                for one in alone:
                    if (frames := int(one.get("NumberOfFrames") or 1)) > 1:
                        raise ValueError(f"the file has {frames} frames: convert it to NIfTI, or to one file for each slice")
            array, about = super().get_data(data)
            if any(not np.allclose(about["affine"], stated_grid(slices), atol=1e-3) for slices in series):
                raise ValueError("the grid that was read is not the one that the slices state")
            return array, about

        def _series(self, found: Any) -> list[list[Any]]:
            """The slices of each folder; empty if files were read."""
            if not self.has_series:
                return []
            return found if isinstance(found[0], list) else [found]

    return SeriesReader()


def stated_grid(slices: Sequence[Any]) -> NDArray[np.float64]:
    """The affine of a volume [columns, rows, slices] that the headers of its slices state, in RAS.

    It comes from the position of the first and the last slice, from orientation and pixel spacing (DICOM PS3.3 C.7.6.2.1.1).

    Args:
        slices: headers of at least two slices, in any order.
    """
    order = np.argsort(positions_along_normal(slices))
    first, last = (np.asarray(slices[i].ImagePositionPatient, dtype=float) for i in (order[0], order[-1]))
    directions = np.asarray(slices[0].ImageOrientationPatient, dtype=float)
    between_rows, between_columns = (float(value) for value in slices[0].PixelSpacing[:2])
    grid = np.eye(4)
    grid[:3, 0], grid[:3, 1] = directions[:3] * between_columns, directions[3:] * between_rows
    grid[:3, 2], grid[:3, 3] = (last - first) / (len(slices) - 1), first
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ grid
