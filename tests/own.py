"""Real weights and data laid out as a user has them: a folder of transformers, a table, a folder of images."""

from __future__ import annotations

import csv
import subprocess
from pathlib import Path

from PIL import Image

from dcft_dist.config import load_config
from dcft_dist.packages import minilm_folder
from dcft_dist.tasks import load_task


def minilm_copy(folder: Path, layers: int) -> Path:
    """The first layers of MiniLM with its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    options = {"num_hidden_layers": layers, "add_pooling_layer": False, "local_files_only": True}
    AutoModel.from_pretrained(minilm_folder(), **options).save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm_folder(), local_files_only=True).save_pretrained(folder)
    return folder


def drug_table(file: Path, rows: int, split: str = "train") -> Path:
    """Reviews of drugs with their ratings as CSV."""
    many = ["--task.train_per_class", "999", "--task.test_per_class", "999"]
    data = getattr(load_task(load_config("icd.toml", ["--task.name", "drug_review", *many])), split)
    step = len(data) // rows
    with file.open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(["review", "rating", "drug"])
        for i in range(0, rows * step, step):
            writer.writerow([data.inputs[i], ["negative", "neutral", "positive"][data.labels[i]], data.groups[i]])
    return file


def install_atlas() -> None:
    """The atlas of the MRI task is a Debian package."""
    if not Path("/usr/share/mricron/templates/aal.nii.gz").exists():
        subprocess.run(["apt-get", "update", "-q"], check=True, capture_output=True)
        subprocess.run(["apt-get", "install", "-y", "-q", "mricron-data"], check=True, capture_output=True)


def mri_folder(folder: Path, per_class: int) -> Path:
    """MRI patches as PNG files, a folder for each region; the place is in the file's name."""
    install_atlas()
    data = load_task(load_config("mri.toml", ["--task.train_per_class", str(per_class)]))
    for i, (patch, label) in enumerate(zip(data.train.inputs, data.train.labels, strict=True)):
        place = folder / data.class_names[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(patch).save(place / f"{data.train.groups[i]}_{i}.png")
    return folder
