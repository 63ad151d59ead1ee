"""Series of DICOM files, a folder each: whether slices are missing, which a reader would stretch over in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .errors import ConfigError

TOLERANCE = 0.05  # of the distance between slices: what scanners round


def problem_of_series(folder: Path) -> str | None:
    """What is wrong with the slices in a folder; None: nothing, or there are no DICOM files in it.

    The positions of the slices along their common normal (Image Position and Orientation (Patient), DICOM PS3.3 C.7.6.2)
    must be evenly spaced.

    Raises:
        ConfigError: the package pydicom is not installed.
    """
    files = sorted(file for file in folder.iterdir() if file.is_file() and _is_dicom(file))
    slices = [(file, header) for file, header in ((file, _header(file)) for file in files) if header is not None]
    if len(slices) < 2:
        return f"{folder}: only {len(slices)} of {len(files)} DICOM files have a place in space" if files else None
    series = {str(header.SeriesInstanceUID) for _, header in slices}
    if len(series) > 1:
        return f"{folder}: the slices of {len(series)} series; a folder for each is needed"
    turned = [np.asarray(header.ImageOrientationPatient, dtype=float) for _, header in slices]
    if not all(np.allclose(turned[0], other, atol=1e-3) for other in turned):
        return f"{folder}: its slices are not parallel"
    normal = np.cross(turned[0][:3], turned[0][3:])
    places = np.asarray([float(normal @ np.asarray(h.ImagePositionPatient, dtype=float)) for _, h in slices])
    order = np.argsort(places)
    gaps = np.diff(places[order])
    usual = float(np.median(gaps))
    for i, gap in enumerate(gaps):
        first, second = slices[order[i]][0], slices[order[i + 1]][0]
        if gap < usual * TOLERANCE:
            return f"{folder}: {first.name} and {second.name} lie at the same place"
        if abs(gap - usual) > usual * TOLERANCE:
            missing = round(gap / usual) - 1
            what = f"{missing} missing between" if missing > 0 else "uneven spacing between"
            return (
                f"{folder}: {what} {first.name} and {second.name}, which lie {gap:.4g} mm apart, the others {usual:.4g} mm"
            )
    return None


def _is_dicom(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _header(file: Path) -> Any:
    try:
        import pydicom
    except ImportError as error:
        raise ConfigError("DICOM files need the package pydicom: pip install 'dcft_dist[monai]'") from error
    found = pydicom.dcmread(file, stop_before_pixels=True)
    return found if "ImagePositionPatient" in found and "ImageOrientationPatient" in found else None
