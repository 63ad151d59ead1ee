"""DICOM files: single images, and series, checked for missing slices that a reader would interpolate across."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, line_of

_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # photometric interpretations (C.7.6.3.1.2)
_STRAIGHT = 0.5  # degrees: positions are rounded
TOLERANCE = 0.05  # fraction of the distance between slices; scanners round positions


def problem_of_series(folder: Path) -> str | None:
    """Checks the slices of a DICOM series, one folder per series.

    The positions of the slices along their common normal (Image Position and Orientation (Patient), DICOM PS3.3 C.7.6.2)
    must be evenly spaced.

    Returns:
        A description of the problem. None if there is none, or if the folder has fewer than two DICOM files.

    Raises:
        ConfigError: the package pydicom is not installed.
    """
    files = sorted(file for file in folder.iterdir() if file.is_file() and is_dicom(file))
    if len(files) < 2:
        return None  # not a series: one file may contain a whole volume
    return problem_of_slices(folder, [file.name for file in files], [_header(file) for file in files])


def problem_of_slices(folder: Path, names: Sequence[str], headers: Sequence[Any]) -> str | None:
    """The same as `problem_of_series`, from the headers of the slices. `names`: of their files."""
    try:
        series = {str(header.SeriesInstanceUID) for header in headers}
        orientations = [np.asarray(header.ImageOrientationPatient, dtype=float) for header in headers]
        spacings = [np.asarray(header.PixelSpacing, dtype=float) for header in headers]
        sizes = {(int(header.Rows), int(header.Columns)) for header in headers}
        along_normal = positions_along_normal(headers)
    except (AttributeError, TypeError, ValueError) as error:
        return f"{folder}: series, position, orientation or pixel spacing of a slice cannot be read: {line_of(error)}"
    if len(series) > 1:
        return f"{folder}: contains slices of {len(series)} series; put each series into its own folder"
    if not all(np.allclose(orientations[0], orientation, atol=1e-3) for orientation in orientations):
        return f"{folder}: the slices are not parallel"
    if len(sizes) > 1 or not all(np.allclose(spacings[0], spacing, rtol=1e-3) for spacing in spacings):
        return f"{folder}: the slices have different sizes or pixel spacings"
    return (
        _uneven_spacing(names, along_normal, folder)
        or _regular_gaps(headers, along_normal, folder)
        or _tilt(headers, along_normal, folder)
    )


def _tilt(headers: Sequence[Any], positions: NDArray[np.float64], folder: Path) -> str | None:
    """Checks that slices lie straight above each other. With a tilted gantry, the grid of voxels would be sheared."""
    places: NDArray[np.float64] = np.stack([np.asarray(header.ImagePositionPatient, dtype=float) for header in headers])
    whole = float(np.linalg.norm(places[positions.argmax()] - places[positions.argmin()]))
    degrees = float(np.degrees(np.arccos(min(np.ptp(positions) / whole, 1.0)))) if whole else 0.0
    if degrees < _STRAIGHT:
        return None
    return f"{folder}: the slices are shifted by {degrees:.1f} degrees (a tilted gantry): resample them to a straight grid"


def positions_along_normal(headers: Sequence[Any]) -> NDArray[np.float64]:
    """Positions of slices along their normal, in mm, from ImagePositionPatient and the first ImageOrientationPatient."""
    directions = np.asarray(headers[0].ImageOrientationPatient, dtype=float)
    positions = np.stack([np.asarray(header.ImagePositionPatient, dtype=float) for header in headers])
    along: NDArray[np.float64] = positions @ np.cross(directions[:3], directions[3:])
    return along


def _regular_gaps(headers: Sequence[Any], positions: NDArray[np.float64], folder: Path) -> str | None:
    """Checks evenly spaced slices for regular gaps, such as every second slice missing.

    Then the slices' numbers have gaps, and the slices lie further apart than they are thick.
    """
    numbers = sorted(int(header.get("InstanceNumber") or 0) for header in headers)
    steps, gap = set(np.diff(numbers).tolist()), float(np.diff(np.sort(positions)).mean())
    thickness = float(headers[0].get("SpacingBetweenSlices") or headers[0].get("SliceThickness") or gap)
    if len(steps) == 1 and (step := steps.pop()) > 1 and gap > thickness * (step - 0.5):
        evidence = f"the slices are numbered in steps of {step} and lie {gap:.4g} mm apart, but are {thickness:.4g} mm thick"
        return f"{folder}: {evidence}: the slices between them are missing"
    return None


def _uneven_spacing(names: Sequence[str], positions: NDArray[np.float64], folder: Path) -> str | None:
    """Describes the first uneven gap. `positions`: of the slices along their normal, in mm."""
    order = np.argsort(positions)
    gaps = np.diff(positions[order])
    usual = float(np.median(gaps))
    for i, gap in enumerate(gaps):
        first, second = names[order[i]], names[order[i + 1]]
        if gap <= usual * TOLERANCE:
            return f"{folder}: {first} and {second} have the same position"
        if abs(gap - usual) > usual * TOLERANCE:
            missing = round(gap / usual) - 1 if usual else 0
            problem = f"missing slices ({missing}) between" if missing > 0 else "uneven spacing between"
            return f"{folder}: {problem} {first} and {second}: they lie {gap:.4g} mm apart, the others {usual:.4g} mm"
    return None


def is_dicom(file: Path) -> bool:
    """Whether a file begins as DICOM files do."""
    with file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def picture_in(file: Path) -> NDArray[np.float32]:
    """Reads the image in a DICOM file as a viewer shows it.

    Grey values go through the file's modality and window (DICOM PS3.3 C.11.1 and C.11.2). The lowest value becomes 0 and the
    highest 1. Images in which low values are bright (MONOCHROME1) are inverted. Palettes are looked up (C.7.6.3.1.5), YBR
    becomes RGB (C.7.6.3.1.2), and the brightest colour is the largest number of the bits that are stored.

    Returns:
        [height, width] or [height, width, 3], from 0 to 1.

    Raises:
        ConfigError: the package pydicom is not installed.
        ValueError: the file has several frames, or colours that are none of these.
    """
    data = _pydicom().dcmread(file)
    if int(data.get("NumberOfFrames") or 1) > 1:
        raise ValueError(f"the file has {data.NumberOfFrames} frames, not one")
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut

    kind = str(data.PhotometricInterpretation)
    if kind == "PALETTE COLOR":
        looked_up = apply_color_lut(data.pixel_array, data)
        return _divided(looked_up, np.iinfo(looked_up.dtype).max)
    if kind in _COLOURS:
        return _divided(data.pixel_array, 2 ** int(data.BitsStored) - 1)  # pydicom has turned YBR into RGB
    if not kind.startswith("MONOCHROME"):
        raise ValueError(f"its colours are {kind}, not one of {', '.join(('MONOCHROME1 or 2', 'PALETTE COLOR', *_COLOURS))}")
    values = np.asarray(apply_voi_lut(apply_modality_lut(data.pixel_array, data), data), dtype=np.float64)
    low, high = values.min(), values.max()
    grey: NDArray[np.float32] = ((values - low) / (high - low or 1.0)).astype(np.float32)
    return 1 - grey if data.PhotometricInterpretation == "MONOCHROME1" else grey


def _divided(values: NDArray[Any], white: int) -> NDArray[np.float32]:
    quotient: NDArray[np.float32] = (values / white).astype(np.float32)
    return quotient


def _header(file: Path) -> Any:
    return _pydicom().dcmread(file, stop_before_pixels=True)


def _pydicom() -> Any:
    try:
        import pydicom
    except ImportError as error:
        raise ConfigError("DICOM files need the package pydicom: pip install 'dcft_dist[monai]'") from error
    return pydicom
