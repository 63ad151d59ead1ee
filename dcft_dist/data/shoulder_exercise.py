"""The task `shoulder_exercise`: predict which of seven shoulder exercises a person does from the sensors of a smartwatch.

Ten people did each exercise with either arm (Burns et al. 2018, arXiv 1802.01489). Accelerometer and gyroscope give six
channels at 50 Hz. An input is a window of 5.1 s as a grey image: the spectrograms of the six channels, one above the other.
Whole people are held out: five are for training, two for validation, three for testing.

The data come with the package seglearn, as a pickle. A pickle may run any code when it is loaded, so it is read by an
unpickler that makes arrays and nothing else.
"""

from __future__ import annotations

import codecs
import pickle
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config.task import Task
from ..errors import DataError
from ..packages import seglearn_file
from .splits import Split, TaskData, draw_of

NAMES = ["pendulum", "abduction", "forward elevation", "internal rotation", "external rotation", "trapezius", "row"]

_FRAME, _HOP, _FRAMES = 64, 2, 96  # samples of a short-time spectrum, samples from one to the next, spectra in a window
_WINDOW = _FRAME + _HOP * (_FRAMES - 1)  # samples
_STEP = _WINDOW // 2  # from one window to the next
_PEOPLE = {"train": 5, "validation": 2, "test": 3}


def shoulder_exercise(task: Task) -> TaskData:
    """Loads the task.

    Args:
        task: numbers of examples per class, and seeds.

    Raises:
        DataError: the package is not installed, or its file is damaged or has other content.
    """
    recordings = read_recordings(seglearn_file())
    people = sorted({person for _, _, person in recordings})
    random.Random(f"{task.split_seed}:people").shuffle(people)
    if len(people) != sum(_PEOPLE.values()):
        raise DataError(f"{seglearn_file()} has {len(people)} people, not {sum(_PEOPLE.values())}")
    sizes = {"train": task.train_per_class, "validation": task.validation_per_class, "test": task.test_per_class}
    splits, first = {}, 0
    for name, number in _PEOPLE.items():
        chosen = set(people[first : first + number])
        first += number
        windows = _windows([recording for recording in recordings if recording[2] in chosen])
        splits[name] = _split(windows, sizes[name], random.Random(draw_of(task, name)))
    caveat = "Ten people did exercises that were asked of them: it is not diagnosis, and three are few to test on."
    return TaskData.of(NAMES, splits, caveat)


Recording = tuple[NDArray[np.float64], int, int]  # [samples, 6]; exercise; person


_reconstruct = np.zeros(0).__reduce__()[0]  # what makes an array that is unpickled


class _OnlyArrays(pickle.Unpickler):
    """Makes arrays, and calls nothing but what makes them."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("numpy.core.multiarray", "_reconstruct"): _reconstruct,  # its path before numpy 2
            ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): codecs.encode,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it would call {module}.{name}")
        return known[module, name]


def read_recordings(file: Path) -> list[Recording]:
    """Reads the recordings without running code from the file.

    Args:
        file: `watch_dataset.npy` of seglearn.

    Raises:
        DataError: the file cannot be read, would run code, or has other content.
    """
    try:
        with file.open("rb") as stream:
            if np.lib.format.read_magic(stream) != (1, 0):
                raise ValueError("it is no .npy file of version 1.0")
            np.lib.format.read_array_header_1_0(stream)
            content = _OnlyArrays(stream, encoding="latin1").load().item()
        channels, exercises, people = content["X"], content["y"], content["subject"]
        if any(x.ndim != 2 or x.shape[1] != 6 for x in channels) or not set(map(int, exercises)) <= set(range(len(NAMES))):
            raise ValueError("recordings with other channels or exercises")
        return [(x, int(y), int(p)) for x, y, p in zip(channels, exercises, people, strict=True)]
    except Exception as error:  # what a damaged pickle raises depends on where it is damaged
        raise DataError(f"{file} cannot be read: {error}") from error


def _windows(recordings: list[Recording]) -> dict[int, list[tuple[NDArray[np.uint8], str]]]:
    """By exercise: the image of each window, and its group, the person."""
    windows: dict[int, list[tuple[NDArray[np.uint8], str]]] = defaultdict(list)
    for values, exercise, person in recordings:
        for first in range(0, len(values) - _WINDOW + 1, _STEP):
            windows[exercise].append((_image(values[first : first + _WINDOW]), f"person {person}"))
    return windows


def _image(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """[96, 96]: log amplitude over time, from 0.8 Hz (below) to 12.5 Hz, of each channel in bands of 16 rows.

    Black is a ten-thousandth of a channel's unit (g; rad/s), white is its hundredfold.
    """
    frames = np.lib.stride_tricks.sliding_window_view(values, _FRAME, axis=0)[::_HOP]  # [96, 6, 64]
    spectra = np.abs(np.fft.rfft(frames * np.hanning(_FRAME), axis=-1))[..., 1:17]  # without the mean
    levels = (np.log10(np.maximum(spectra, 1e-4)) + 4) / 6
    bands = levels.transpose(1, 2, 0)[:, ::-1]  # [6, 16, 96], high frequencies above
    return np.asarray(np.clip(bands.reshape(-1, _FRAMES), 0, 1) * 255, np.uint8)


def _split(windows: dict[int, list[tuple[NDArray[np.uint8], str]]], number: int, draw: random.Random) -> Split:
    images, labels, groups = [], [], []
    for exercise in range(len(NAMES)):
        found = windows[exercise]
        for image, group in draw.sample(found, min(number, len(found))):
            images.append(image)
            labels.append(exercise)
            groups.append(group)
    return Split(np.stack(images), labels, groups)
