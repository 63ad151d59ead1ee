"""Every block of docs/choices.md is a configuration that trains; all choices together are the same under every engine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dcft_dist.cli import main
from dcft_dist.files import read_json

from .objectives.test_language import CHAT
from .objectives.test_losses import ROWS
from .own import instructions, tiny_decoder, tiny_encoder
from .processes import output_of
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


ANSWERS = """
task = {{name = "own", kind = "causal_lm", max_tokens = 64}}
data = {{path = "{folder}/codes.jsonl", modality = "text", input = "prompt", label = "answer", group = "code"}}
model = {{name = "own", build = "transformers.AutoModelForCausalLM", weights = "{folder}/decoder", head = []}}
importance = {{num_samples = 32, score_batch = 16}}
train = {{global_batch = 16}}
"""


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind of data that a block is about -> the file that it extends."""
    folder = tmp_path_factory.mktemp("bases")
    (folder / "texts.toml").write_text(SHORT + SMALL.replace("WEIGHTS", str(tiny_encoder(folder / "encoder"))))
    (folder / "choices_rows.py").write_text(ROWS)
    (folder / "images.toml").write_text(IMAGES.format(folder=folder))
    instructions(folder / "codes.jsonl", 80)
    (tiny_decoder(folder / "decoder") / "chat_template.jinja").write_text(CHAT)
    (folder / "answers.toml").write_text(ANSWERS.format(folder=folder))
    return {kind: folder / f"{kind}.toml" for kind in ("texts", "images", "answers")}


def kind_of(block: str) -> str:
    return (
        "images" if "mixup" in block or "folds" in block else "answers" if "chat" in block or "packing" in block else "texts"
    )


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_of_the_page_trains(number: int, bases: dict[str, Path], tmp_path: Path) -> None:
    block = BLOCKS[number]
    (tmp_path / "mine.toml").write_text(f'extends = "{bases[kind_of(block)]}"\nname = "mine"\n{block}')
    words = ["--runs_dir", str(tmp_path), "--engine", "single", "--train.max_steps", "2", "--head_warmup.max_epochs", "1"]
    assert main(["train", str(tmp_path / "mine.toml"), *words, "--removal.fractions", "[]"]) == 0
    assert read_json(tmp_path / "mine/estimate.json")["steps"] > 2


TOGETHER = """
method = "dcft"
penalty.factor = 0.1
test_resamples = 0
data.augment = "light"
data.flip = true
task.label_smoothing = 0.1
head_warmup.max_epochs = 2
removal.fractions = []
[train]
epochs = 2
mixup = 0.4
cutmix = 1.0
ema = 0.8
schedule = "wsd"
calibrate = true
fall_back = false
global_batch = 16
micro_batch = 4
[optimizer]
name = "sgd"
lr = 0.02
layer_decay = 0.7
[[optimizer.groups]]
pattern = "*.bias"
lr_scale = 0.5
"""

ENGINES = {
    "ddp": ["--engine", "ddp"],
    "fsdp1": ["--engine", "fsdp1"],
    "fsdp2": ["--engine", "fsdp2"],
    "zero2": ["--engine", "deepspeed", "--sharding.zero_stage", "2"],
    "zero3": ["--engine", "deepspeed", "--sharding.zero_stage", "3"],
}


def test_all_choices_together_equal_one_process(bases: dict[str, Path], tmp_path: Path) -> None:
    """Variants, mixing, smoothing, averages, schedule, groups and calibration at once, on two ranks of every engine."""
    base = bases["images"].read_text().replace("train = {global_batch = 16, micro_batch = 4}", "")
    (tmp_path / "mine.toml").write_text(base + TOGETHER)

    def weights(name: str, *words: str, ranks: int = 2) -> dict[str, torch.Tensor]:
        output_of("train", tmp_path / "mine.toml", "--runs_dir", tmp_path, "--name", name, *words, ranks=ranks)
        files = (tmp_path / name / "model").rglob("model.safetensors")
        return {key: value for file in files for key, value in load_file(file).items()}

    one = weights("one", "--engine", "single", ranks=1)
    for name, words in ENGINES.items():
        for key, value in weights(name, *words).items():
            torch.testing.assert_close(value, one[key], rtol=0, atol=3e-5, msg=f"{name}: {key}")
    plain = weights("plain", "--engine", "single", "--train.mixup", "0", "--train.cutmix", "0", ranks=1)
    assert any((plain[n] - w).abs().max() > 3e-4 for n, w in one.items())
