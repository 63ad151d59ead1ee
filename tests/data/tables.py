"""Tables, texts and pictures as a user has them, and the task that a configuration makes of them."""

from __future__ import annotations

import csv
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dcft_dist.config.toml import load_config
from dcft_dist.data.splits import TaskData
from dcft_dist.data.user_task import user_task


def task_of(*words: str) -> TaskData:
    return user_task(load_config("icd.toml", ["--task.name", "own", *words]))


def table(folder: Path, rows: list[dict[str, Any]], name: str = "data.csv") -> Path:
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder / name


def texts(number: int = 40, groups: int = 20) -> list[dict[str, Any]]:
    return [{"input": f"text {i}", "label": "ab"[i % 2], "patient": f"p{i % groups}"} for i in range(number)]


TEXT = ["--data.modality", "text"]


def picture(file: Path, value: int | None = None, size: int = 8) -> Path:
    """A picture of one grey value, or of noise that no other file has."""
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(zlib.crc32(str(file).encode())).integers(0, 256, (size, size), np.uint8)
    Image.fromarray(noise if value is None else np.full((size, size), value, np.uint8)).save(file)
    return file
