"""What was understood of the data, for people to compare with what they know: sizes, ranges, classes, groups, pictures.

A wrong spacing, a flipped image or a swapped class is seen at a glance, and by no check.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, counted
from ..files import write_atomic
from .batches import Processor
from .splits import Split, TaskData, name_of

SHOWN = 3  # examples of each split that are described
_ON_SHEET = 8  # examples of each split on a contact sheet
_FEW = 5  # examples of a class
_IF_RARE = (
    f"  fewer than {_FEW} examples of a class say little about it. More of them help most; "
    'task.class_weights = "balanced" lets those of rare classes count more'
)
_SIDE, _MARGIN, _LINE = 192, 8, 14  # pixels of a picture, around it, and of a line of text


def description(task: TaskData, processor: Processor) -> str:
    """Describes each split and its first examples, a line for each.

    Args:
        task: the data.
        processor: the model's; it describes an input.
    """
    lines = [line for name, split in task.splits.items() for line in _lines(name, split, task, processor)]
    if any(_rare(split, task) for split in task.splits.values()):
        lines.append(_IF_RARE)
    return "\n".join(lines)


def _lines(name: str, split: Split, task: TaskData, processor: Processor) -> Iterator[str]:
    has_groups = any(group not in (name_of(value, ""), "") for value, group in zip(split.inputs, split.groups, strict=True))
    groups = f" in {counted(len(set(split.groups)), 'group')}" if has_groups else ", no groups"
    yield f"{name}: {counted(len(split), 'example')}{groups}{_counts(split, task)}{_rare(split, task)}"
    for i in _first(split, SHOWN):
        value, label = split.inputs[i], split.labels[i]
        grouped = f"; group {split.groups[i]}" if split.groups[i] not in (name_of(value, ""), "") else ""
        yield f"  {_short(value, i)}: {processor.describe(value, label)}{_named(label, task)}{grouped}"


def _first(split: Split, number: int) -> list[int]:
    """The first examples of a split, one of each class before a second one of any."""
    seen: Counter[int] = Counter()
    turns = []
    for i, label in enumerate(split.labels):
        key = label if isinstance(label, int) else 0
        turns.append((seen[key], i))
        seen[key] += 1
    return sorted(i for _, i in sorted(turns)[:number])


def _counts(split: Split, task: TaskData) -> str:
    """How often each class or finding occurs, or the range of a number."""
    labels = [label for label in split.labels if isinstance(label, int | float | list)]
    if len(labels) < len(split) or not labels:
        return ""
    if isinstance(labels[0], list):
        values = np.asarray(labels, dtype=float)
        texts = [
            f"{name} {int(np.nansum(column))} of {int((~np.isnan(column)).sum())}"
            for name, column in zip(task.class_names, values.T, strict=True)
        ]
        return f"; positive: {', '.join(texts)}"
    if isinstance(labels[0], float):
        return f"; {task.class_names[0]} from {min(labels):g} to {max(labels):g}, mean {np.mean(labels):g}"
    counts = Counter(labels)
    return f"; {', '.join(f'{name} {counts[i]}' for i, name in enumerate(task.class_names))}"


def _rare(split: Split, task: TaskData) -> str:
    """A warning if a class has so few examples that its numbers say little."""
    counts = Counter(label for label in split.labels if isinstance(label, int))
    few = [text for i, text in enumerate(task.class_names) if counts and counts[i] < _FEW]
    return f" (careful: fewer than {_FEW} of {', '.join(few)})" if few else ""


def _named(label: Any, task: TaskData) -> str:
    """The label of an example in words; nothing if the description has it: a mask, an answer."""
    if isinstance(label, list):
        return f"; positive: {', '.join(n for n, v in zip(task.class_names, label, strict=True) if v == 1) or 'none'}"
    if isinstance(label, float):
        return f"; {task.class_names[0]} {label:g}"
    return f"; {task.class_names[label]}" if isinstance(label, int) else ""


def _short(value: Any, index: int) -> str:
    name = name_of(value, f"example {index}")
    return Path(name).name if isinstance(value, Path | tuple) else name if len(name) <= 40 else f"{name[:37]}..."


def contact_sheet(task: TaskData, processor: Processor, file: Path) -> int:
    """Draws the first examples of each split as the model sees them, and writes them to a PNG file.

    Args:
        task: the data.
        processor: the model's; it draws an input.
        file: the file to write.

    Returns:
        Number of pictures.

    Raises:
        DataError: the inputs are no pictures.
    """
    from PIL import Image, ImageDraw

    side = _SIDE * (2 if processor.drawn_as else 1)  # volumes show three slices each
    rows: list[list[tuple[str, Any]]] = []
    for name, split in task.splits.items():
        drawn = ((i, processor.picture(split.inputs[i], split.labels[i])) for i in _first(split, _ON_SHEET))
        rows.append(
            [
                (f"{name}: {_short(split.inputs[i], i)}{_named(split.labels[i], task)}", _fitted(picture, side))
                for i, picture in drawn
                if picture is not None
            ]
        )
    if not any(rows):
        raise DataError("--sheet: these inputs cannot be drawn")
    heights = [max((image.height for _, image in row), default=0) + 2 * _LINE + _MARGIN for row in rows]
    sheet = Image.new("RGB", (_MARGIN + max(map(len, rows)) * (side + _MARGIN), _MARGIN + sum(heights) + _LINE), "white")
    draw, letters = ImageDraw.Draw(sheet), side // 6
    for y, row in enumerate(rows):
        for x, (caption, image) in enumerate(row):
            left, top = _MARGIN + x * (side + _MARGIN), _MARGIN + sum(heights[:y])
            sheet.paste(image, (left, top))
            for number, begin in enumerate(range(0, min(len(caption), 2 * letters), letters)):
                draw.text((left, top + image.height + number * _LINE), caption[begin : begin + letters], fill="black")
    draw.text((_MARGIN, sheet.height - _LINE), processor.drawn_as, fill="black")
    content = io.BytesIO()
    sheet.save(content, "PNG")
    write_atomic(file, content.getvalue())
    return sum(map(len, rows))


def _fitted(picture: NDArray[np.uint8], side: int) -> Any:
    """The picture as an image of PIL; its longer side has `side` pixels."""
    from PIL import Image

    image = Image.fromarray(picture)
    scale = side / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX)


def as_rgb(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Values from 0 to 1 as 8-bit colours: [height, width] or [height, width, channels] -> [height, width, 3]."""
    grey = values.ndim == 2 or values.shape[2] != 3
    plane = values if values.ndim == 2 else values[:, :, 0]
    colours = np.repeat(plane[:, :, None], 3, axis=2) if grey else values
    out: NDArray[np.uint8] = (np.clip(np.nan_to_num(colours), 0, 1) * 255).round().astype(np.uint8)
    return out


def stretched(values: NDArray[Any]) -> NDArray[Any]:
    """Values scaled so that the lowest is 0 and the highest 1."""
    low, high = float(values.min()), float(values.max())
    return (values - low) / (high - low or 1.0)
