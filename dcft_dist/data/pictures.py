"""What the numbers in a picture file mean: upright, one page, and grey or colour with an optional opacity."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_MODES = {"1", "L", "RGB", "RGBA", "F"}  # these say what they are
_CONVERTED = {"PA": "RGBA", "CMYK": "RGB", "YCbCr": "RGB", "HSV": "RGB", "RGBX": "RGB", "RGBa": "RGBA"}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags and a value of TIFF 6.0


def open_picture(file: Path | io.BytesIO, convert: Callable[[Any], Any]) -> Any:
    """Opens a picture and converts it.

    Args:
        file: path, or contents.
        convert: `plain_picture` or `plain_mask`.

    Raises:
        OSError: the file is empty, or Pillow cannot read it.
        ValueError: see `convert`.
    """
    from PIL import Image, UnidentifiedImageError

    # Not by its name: then Pillow maps TIFF files into memory, and garbles those that lie on their side (13.0.0).
    if isinstance(file, Path) and not file.stat().st_size:
        raise OSError("the file is empty")
    try:
        with file if isinstance(file, io.BytesIO) else file.open("rb") as stream, Image.open(stream) as image:
            picture = convert(image)
            picture.load()
            return picture
    except UnidentifiedImageError:
        raise OSError("it is no picture that Pillow knows, or it is damaged") from None


def plain_mask(image: Any) -> Any:
    """Turns a mask upright. A palette only colours it: the stored numbers are the classes.

    Raises:
        ValueError: the file has several pages or frames.
    """
    return _upright(image)


def plain_picture(image: Any) -> Any:
    """Turns a picture of Pillow upright, and its palette or colour space into grey or colour.

    Args:
        image: a `PIL.Image.Image`, as it was opened.

    Returns:
        A picture of mode 1, L, RGB, RGBA, F, or I (16 bits), turned as its EXIF orientation says.

    Raises:
        ValueError: the file has several pages or frames, or its colours need a colour profile to be converted (L*a*b*).
    """
    white_is_zero = image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    twelve_bits = image.format == "TIFF" and image.tag_v2.get(_BITS_PER_SAMPLE) == (12,)
    upright = _upright(image)
    if upright.mode.startswith("I"):
        return _of_16_bits(upright, 4095 if twelve_bits else 65535, white_is_zero)
    if upright.mode == "P":
        colours = upright.convert("RGB")
        pixels = np.asarray(colours)
        is_grey = bool((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all())
        return colours.getchannel(0) if is_grey else colours
    if upright.mode in ("LA", "La"):
        return upright.convert("LA").getchannel(0)
    if upright.mode not in _MODES and upright.mode not in _CONVERTED:
        raise ValueError(f"pictures of mode {upright.mode} cannot be converted to grey or RGB: convert the file")
    return upright.convert(_CONVERTED[upright.mode]) if upright.mode in _CONVERTED else upright


def plain_channels(image: Any) -> Any:
    """The same as `plain_picture`, without opacity: grey or RGB.

    Raises:
        ValueError: see `plain_picture`.
    """
    picture = plain_picture(image)
    return picture.convert("RGB") if picture.mode == "RGBA" else picture


def _upright(image: Any) -> Any:
    """The one page of a file, turned as its EXIF orientation says."""
    from PIL import ImageOps

    pages = int(getattr(image, "n_frames", 1))
    if pages > 1 and image.format != "MPO":  # the further pictures of an MPO from a camera are previews
        raise ValueError(f"the file has {pages} pages or frames, not one")
    return ImageOps.exif_transpose(image)


def _of_16_bits(image: Any, white: int, white_is_zero: bool) -> Any:
    """A picture of 16 bits, which Pillow may return as 32, with 65535 for white. Pillow inverts only those of 8 bits."""
    from PIL import Image

    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f"values from {pixels.min()} to {pixels.max()} do not fit into 16 bits")
    scaled = np.rint(pixels.astype(np.float64) * (65535 / white)).astype(np.uint16)
    return Image.fromarray(65535 - scaled if white_is_zero else scaled)
