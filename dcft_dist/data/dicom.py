"""DICOM files: pictures, and series, a folder each, of which slices may be missing that a reader would stretch over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, line_of

TOLERANCE = 0.05  # of the distance between slices: what scanners round


def problem_of_series(folder: Path) -> str | None:
    """What is wrong with the slices in a folder; None: nothing, or there are no DICOM files in it.

    The positions of the slices along their common normal (Image Position and Orientation (Patient), DICOM PS3.3 C.7.6.2)
    must be evenly spaced.

    Raises:
        ConfigError: the package pydicom is not installed.
    """
    files = sorted(file for file in folder.iterdir() if file.is_file() and is_dicom(file))
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


def is_dicom(file: Path) -> bool:
    """Whether a file begins as DICOM files do."""
    with file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def picture_in(file: Path) -> NDArray[np.float32]:
    """A picture in a DICOM file as it is meant to be seen: [height, width] or [height, width, 3], from 0 to 1.

    Grey values go through the file's modality and window (DICOM PS3.3 C.11.1 and C.11.2), its lowest and highest become 0
    and 1, and where low values are bright (MONOCHROME1) they are turned round.

    Raises:
        ConfigError: the package pydicom is not installed.
        ValueError: there are several frames.
    """
    data = _pydicom().dcmread(file)
    if int(data.get("NumberOfFrames") or 1) > 1:
        raise ValueError(f"{data.NumberOfFrames} frames, not one picture")
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    if not str(data.PhotometricInterpretation).startswith("MONOCHROME"):
        colours: NDArray[np.float32] = (data.pixel_array / np.iinfo(data.pixel_array.dtype).max).astype(np.float32)
        return colours
    values = np.asarray(apply_voi_lut(apply_modality_lut(data.pixel_array, data), data), dtype=np.float64)
    low, high = values.min(), values.max()
    shares: NDArray[np.float32] = ((values - low) / (high - low or 1.0)).astype(np.float32)
    return 1 - shares if data.PhotometricInterpretation == "MONOCHROME1" else shares


def _header(file: Path) -> Any:
    return _pydicom().dcmread(file, stop_before_pixels=True)


def _pydicom() -> Any:
    try:
        import pydicom
    except ImportError as error:
        raise ConfigError("DICOM files need the package pydicom: pip install 'dcft_dist[monai]'") from error
    return pydicom
