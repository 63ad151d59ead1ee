"""Command-line words of a segmentation of volumes."""

from __future__ import annotations

CLASSES = '["none", "grey", "white"]'


KEYS = ["--task.name", "own", "--task.kind", "segmentation", "--data.modality", "volume", "--data.classes", CLASSES]


KEYS += ["--data.input", "image", "--data.label", "mask", "--data.split", "split", "--data.patch", "[32, 32, 8]"]
