"""Series of DICOM files, a folder each: whether slices are missing, which a reader would stretch over in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError, line_of

TOLERANCE = 0.05  # of the distance between slices: what scanners round


def problem_of_series(folder: Path) -> str | None:
    """What is wrong with the slices in a folder; None: nothing, or there are no DICOM files in it.

    The positions of the slices along their common normal (Image Position and Orientation (Patient), DICOM PS3.3 C.7.6.2)
    must be evenly spaced.

    Raises:
        ConfigError: the package pydicom is not installed.
    """
    files = sorted(file for file in folder.iterdir() if file.is_file() and _is_dicom(file))
    if len(files) < 2:
        return None  # no series: a file may hold a whole volume
    try:
        slices = [(file, _header(file)) for file in files]
        series = {str(header.SeriesInstanceUID) for _, header in slices}
        turned = [np.asarray(header.ImageOrientationPatient, dtype=float) for _, header in slices]
        places = [np.asarray(header.ImagePositionPatient, dtype=float) for _, header in slices]
    except (AttributeError, TypeError, ValueError) as error:
        return f"{folder}: a slice does not say what series it is of, or where it lies: {line_of(error)}"
    if len(series) > 1:
        return f"{folder}: the slices of {len(series)} series; a folder for each is needed"
    if not all(np.allclose(turned[0], other, atol=1e-3) for other in turned):
        return f"{folder}: its slices are not parallel"
    along = np.stack(places) @ np.cross(turned[0][:3], turned[0][3:])
    return _problem_of_places([file.name for file in files], along, folder) or _regular_gaps(
        [header for _, header in slices], along, folder
    )


def _regular_gaps(headers: list[Any], places: NDArray[np.float64], folder: Path) -> str | None:
    """Evenly spaced, but numbered with gaps and further apart than slices are thick: every second one may be missing."""
    numbers = sorted(int(header.get("InstanceNumber") or 0) for header in headers)
    steps, gap = set(np.diff(numbers).tolist()), float(np.diff(np.sort(places)).mean())
    apart = float(headers[0].get("SpacingBetweenSlices") or headers[0].get("SliceThickness") or gap)
    if len(steps) == 1 and (step := steps.pop()) > 1 and gap > apart * (step - 0.5):
        found = f"slices numbered in steps of {step}, {gap:.4g} mm apart and {apart:.4g} mm thick"
        return f"{folder}: {found}: the others are missing"
    return None


def _problem_of_places(names: list[str], places: NDArray[np.float64], folder: Path) -> str | None:
    """`places`: of the slices along their normal, in mm."""
    order = np.argsort(places)
    gaps = np.diff(places[order])
    usual = float(np.median(gaps))
    for i, gap in enumerate(gaps):
        first, second = names[order[i]], names[order[i + 1]]
        if gap <= usual * TOLERANCE:
            return f"{folder}: {first} and {second} lie at the same place"
        if abs(gap - usual) > usual * TOLERANCE:
            missing = round(gap / usual) - 1 if usual else 0
            what = f"{missing} missing between" if missing > 0 else "uneven spacing between"
            return f"{folder}: {what} {first} and {second}, which lie {gap:.4g} mm apart, the others {usual:.4g} mm"
    return None


def _is_dicom(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _header(file: Path) -> Any:
    try:
        import pydicom
    except ImportError as error:
        raise ConfigError("DICOM files need the package pydicom: pip install 'dcft_dist[monai]'") from error
    return pydicom.dcmread(file, stop_before_pixels=True)
