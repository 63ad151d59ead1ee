"""MONAI's readers of files, made strict: they refuse what they would otherwise read as something else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .dicom_series import series_reader
from .pictures import open_picture

_PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


def loader(key: str, convert: Callable[[Any], Any]) -> Any:
    """MONAI's transform that reads the files under a key; data without the key are left as they are.

    Args:
        key: `image` or `mask`.
        convert: what is done to pictures such as PNG (see `pictures`).
    """
    from monai import data
    from monai import transforms as mt

    class PictureReader(data.PILReader):
        def __init__(self) -> None:
            # Rows first, as in pre-training on images. MONAI opens by name, which `open_picture` must not.
            super().__init__(lambda image: open_picture(Path(image.filename), convert), reverse_indexing=False)

        def verify_suffix(self, filename: Any) -> bool:
            files = [filename] if isinstance(filename, str | Path) else list(filename)
            return all(Path(file).suffix.lower() in _PICTURES for file in files)

    load = mt.LoadImaged([key], ensure_channel_first=True, image_only=True, allow_missing_keys=True)
    load.register(_real(_arrays(data.NumpyReader)))
    load.register(_real(data.NibabelReader))
    load.register(PictureReader())
    load.register(series_reader())
    return load


def _arrays(reader: Any) -> Any:
    """A reader of .npy and .npz files that never unpickles. Some versions of MONAI do, and a pickle may run any code."""

    class Arrays(reader):  # type: ignore[misc]
        def read(self, data: Any, **_: Any) -> Any:
            arrays = []
            for name in [data] if isinstance(data, str | Path) else data:
                loaded = np.load(name, allow_pickle=False)
                arrays += [loaded] if isinstance(loaded, np.ndarray) else [loaded[key] for key in loaded]
            if not arrays or any(array.ndim < 1 for array in arrays):
                raise ValueError("it has numbers, not arrays")
            return arrays if len(arrays) > 1 else arrays[0]

    return Arrays


def _real(reader: Any) -> Any:
    """A reader that refuses complex numbers; MONAI drops the imaginary part."""

    class Real(reader):  # type: ignore[misc]
        def get_data(self, img: Any) -> Any:
            array, about = super().get_data(img)
            if np.iscomplexobj(array):
                raise ValueError("the values are complex numbers: save their modulus, or what else is meant")
            return array, about

    return Real()
