"""Every block of docs/choices.md is a configuration that trains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dcft_dist.cli import main
from dcft_dist.files import read_json

from .objectives.test_losses import ROWS
from .own import tiny_encoder
from .train.test_run import SHORT, SMALL

PAGE = (Path(__file__).parent.parent / "docs/choices.md").read_text()
BLOCKS = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)

IMAGES = """
extends = "mri.toml"
task.name = "own"
data.format = "python"
data.build = "choices_rows.rows"
model = {{num_layers = 1, image_size = 28}}
import_roots = ["{folder}"]
importance = {{num_samples = 32, score_batch = 16}}
train = {{global_batch = 16, micro_batch = 4}}
"""


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Whether the block is about images -> the file that it extends."""
    folder = tmp_path_factory.mktemp("bases")
    (folder / "texts.toml").write_text(SHORT + SMALL.replace("WEIGHTS", str(tiny_encoder(folder / "encoder"))))
    (folder / "choices_rows.py").write_text(ROWS)
    (folder / "images.toml").write_text(IMAGES.format(folder=folder))
    return {False: folder / "texts.toml", True: folder / "images.toml"}


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_of_the_page_trains(number: int, bases: dict[bool, Path], tmp_path: Path) -> None:
    block = BLOCKS[number]
    (tmp_path / "mine.toml").write_text(f'extends = "{bases["mixup" in block]}"\nname = "mine"\n{block}')
    words = ["--runs_dir", str(tmp_path), "--engine", "single", "--train.max_steps", "2", "--head_warmup.max_epochs", "1"]
    assert main(["train", str(tmp_path / "mine.toml"), *words, "--removal.fractions", "[]"]) == 0
    assert read_json(tmp_path / "mine/estimate.json")["steps"] > 2
