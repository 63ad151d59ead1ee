"""Pictures are read as they are seen: out come the pixels that were written, upright, whatever the file calls them."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from dcft_dist.data.images import read_image
from dcft_dist.errors import DataError

Pixels = NDArray[Any]

# EXIF 2.32, tag 0x0112: what turns the stored rows and columns into the picture as it is seen.
UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x[::-1].swapaxes(0, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x[:, ::-1].swapaxes(0, 1),
}
SIZES = [(1, 1), (1, 9), (7, 2), (5, 5), (8, 16), (16, 3), (3, 13)]


def written(mode: str, size: tuple[int, int], draw: np.random.Generator) -> tuple[Image.Image, Pixels]:
    """A picture of a mode, and its pixels [height, width] or [height, width, 3] as they are meant, from 0 to 1."""
    grey = draw.integers(0, 256, size, np.uint8)
    colour = draw.integers(0, 256, (*size, 3), np.uint8)
    opacity = draw.integers(0, 256, (*size, 1), np.uint8)
    palette = draw.integers(0, 256, (256, 3), np.uint8)
    if mode == "1":
        return Image.fromarray(grey > 127), (grey > 127).astype(float)
    if mode == "L":
        return Image.fromarray(grey), grey / 255
    if mode == "LA":
        return Image.fromarray(np.concatenate([grey[..., None], opacity], -1)), grey / 255
    if mode == "RGB":
        return Image.fromarray(colour), colour / 255
    if mode == "RGBA":
        return Image.fromarray(np.concatenate([colour, opacity], -1)), colour / 255
    if mode == "I;16":
        deep = draw.integers(0, 65536, size).astype(np.uint16)
        return Image.fromarray(deep), deep / 65535
    indices = Image.fromarray(grey).copy()
    if mode == "P grey":  # a palette that runs from white to black
        indices.putpalette(np.repeat(np.arange(255, -1, -1, dtype=np.uint8), 3).tobytes())
        return indices, (255 - grey) / 255
    indices.putpalette(palette.tobytes())
    return indices, palette[grey] / 255


MODES = {
    "png": ["1", "L", "LA", "RGB", "RGBA", "I;16", "P grey", "P"],
    "tiff": ["1", "L", "LA", "RGB", "RGBA", "I;16", "P grey", "P"],
    "webp": ["RGB"],
    "bmp": ["1", "L", "RGB", "P grey", "P"],
    "gif": ["P grey", "P"],
}


def read(file: Path, channels: int) -> Pixels:
    found: Pixels = read_image(file, channels).permute(1, 2, 0).double().numpy()
    return found


def test_formats_modes_depths_and_orientations(tmp_path: Path) -> None:
    """More than 2,000 pictures. The formats turn them by their orientation, without loss, where they can state one."""
    cases = list(itertools.product(["png", "tiff", "webp"], SIZES, UPRIGHT))
    cases += [(form, size, 1) for form in ("bmp", "gif") for size in SIZES]
    number = 0
    for (form, size, orientation), repeat in itertools.product(cases, range(2)):
        for mode in MODES[form]:
            number += 1
            image, stored = written(mode, size, np.random.default_rng(number))
            exif = Image.Exif()
            exif[0x0112] = orientation
            file = tmp_path / f"picture.{form}"
            image.save(file, **({"exif": exif} if orientation > 1 else {}), **({"lossless": True} if form == "webp" else {}))
            wanted = UPRIGHT[orientation](stored)
            case = (form, mode, size, orientation, repeat)
            wide = wanted if wanted.ndim == 3 else np.repeat(wanted[..., None], 3, -1)
            found = read(file, 3)
            assert found.shape == wide.shape and np.abs(found - wide).max() < 1e-6, case
            if wanted.ndim == 2 or size == (1, 1):
                continue
            with pytest.raises(DataError, match="does not fit 1 channels"):
                read(file, 1)
    assert number >= 2000, number


def tiff(file: Path, values: Pixels, bits: int, photometric: int) -> Path:
    """A grey TIFF by hand (TIFF 6.0), since Pillow writes neither 12 bits nor "white is zero" (photometric 0)."""
    height, width = values.shape
    if bits == 12:
        rows = ["".join(f"{int(v):012b}" for v in row) for row in values]
        data = b"".join(int(row.ljust(-(-len(row) // 8) * 8, "0"), 2).to_bytes(-(-len(row) // 8), "big") for row in rows)
    else:
        data = values.astype("<u2" if bits == 16 else np.uint8).tobytes()
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*tags, (279, len(data))])
    begin = 8 + len(data) + len(data) % 2
    file.write_bytes(
        struct.pack("<2sHI", b"II", 42, begin) + data.ljust(begin - 8, b"\0") + struct.pack("<H", 9) + entries + bytes(4)
    )
    return file


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("photometric", [0, 1])
def test_which_number_is_white(bits: int, photometric: int, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 2**bits, (5, 7))
    wanted, file = values / (2**bits - 1), tiff(tmp_path / "a.tif", values, bits, photometric)
    if (bits, photometric) == (12, 0):
        with pytest.raises(DataError, match="it is no picture that Pillow knows, or it is damaged"):
            read(file, 1)
        return
    found = read(file, 1)[..., 0]
    assert np.abs(found - (wanted if photometric else 1 - wanted)).max() < 1e-5


def test_inks_become_light(tmp_path: Path) -> None:
    inks = np.random.default_rng(0).integers(0, 256, (6, 7, 4), np.uint8)
    Image.fromarray(inks, "CMYK").save(tmp_path / "a.tif")
    wanted = (1 - inks[..., :3] / 255) * (1 - inks[..., 3:] / 255)
    assert np.abs(read(tmp_path / "a.tif", 3) - wanted).max() < 1.01 / 255


def test_several_pictures_in_a_file(tmp_path: Path) -> None:
    pages = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (10, 200)]
    for name in ("a.tif", "a.gif", "a.webp", "a.png"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        with pytest.raises(DataError, match=f"{name}: cannot be read as an image: the file has 2 pages or frames"):
            read(tmp_path / name, 3)
    pages[0].save(tmp_path / "a.mpo", "MPO", save_all=True, append_images=pages[1:])  # a camera's, with a preview
    assert abs(read(tmp_path / "a.mpo", 1).mean() * 255 - 10) < 2


def test_colours_and_numbers_that_do_not_say_what_they_are(tmp_path: Path) -> None:
    rgb = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    lab = ImageCms.profileToProfile(rgb, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")
    assert lab is not None
    lab.save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a.tif: .*mode LAB cannot be converted"):
        read(tmp_path / "a.tif", 3)
    np.save(tmp_path / "a.npy", np.full((4, 4), 0.1 + 0.9j))
    with pytest.raises(DataError, match=r"a.npy: .*complex numbers"):
        read(tmp_path / "a.npy", 1)


# -- DICOM ---------------------------------------------------------------------------------------------------------------


def dicom(file: Path, kind: str, pixels: Pixels, stored: int, **more: Any) -> Path:
    """A colour picture as a secondary capture; `pixels`: [height, width, 3], or [height, width] of indices."""
    import pydicom
    from pydicom.dataset import FileMetaDataset

    data, meta = pydicom.Dataset(), FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = data.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = pydicom.uid.generate_uid()
    data.file_meta, data.PhotometricInterpretation = meta, kind
    data.Rows, data.Columns, data.PixelRepresentation = *pixels.shape[:2], 0
    data.SamplesPerPixel, data.PlanarConfiguration = pixels.shape[2] if pixels.ndim == 3 else 1, 0
    data.BitsAllocated, data.BitsStored, data.HighBit = pixels.dtype.itemsize * 8, stored, stored - 1
    data.PixelData = pixels.tobytes() + bytes(pixels.nbytes % 2)
    for name, value in more.items():
        setattr(data, name, value)
    data.save_as(file, enforce_file_format=True)
    return file


@pytest.mark.parametrize("bits", [8, 16])
def test_a_palette_of_dicom_is_looked_up(bits: int, tmp_path: Path) -> None:
    draw = np.random.default_rng(bits)
    palette = draw.integers(0, 2**bits, (256, 3)).astype(np.uint16)
    indices = draw.integers(0, 256, (6, 9), np.uint8)
    more: dict[str, Any] = {}
    for colour, column in zip(("Red", "Green", "Blue"), palette.T, strict=True):
        more[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
        more[f"{colour}PaletteColorLookupTableData"] = column.astype("<u2" if bits == 16 else np.uint8).tobytes()
    found = read(dicom(tmp_path / "a.dcm", "PALETTE COLOR", indices, 8, **more), 3)
    assert np.abs(found - palette[indices] / (2**bits - 1)).max() < 1e-4


@pytest.mark.parametrize("stored", [8, 10, 12, 16])
def test_colours_are_as_bright_as_the_stored_bits_say(stored: int, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 2**stored, (6, 9, 3)).astype(np.uint8 if stored == 8 else np.uint16)
    found = read(dicom(tmp_path / "a.dcm", "RGB", pixels, stored), 3)
    assert np.abs(found - pixels / (2**stored - 1)).max() < 1e-4


def test_luminance_and_chrominance_become_colours(tmp_path: Path) -> None:
    """YBR_FULL by the formula of DICOM PS3.3 C.7.6.3.1.2."""
    y, cb, cr = np.moveaxis(pixels := np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8), -1, 0).astype(float)
    rgb = np.stack([y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)], -1)
    found = read(dicom(tmp_path / "a.dcm", "YBR_FULL", pixels, 8), 3)
    assert np.abs(found - np.clip(rgb, 0, 255) / 255).max() < 1.6 / 255


def test_colours_of_dicom_that_are_not_known(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"its colours are HSV, not one of MONOCHROME1 or 2, PALETTE COLOR, RGB"):
        read(dicom(tmp_path / "a.dcm", "HSV", np.zeros((6, 8, 3), np.uint8), 8), 3)
