"""Temperature scaling: the temperature of lowest loss, which the exported head has in it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch.nn import functional

from dcft_dist.cli import main
from dcft_dist.config.toml import load_config
from dcft_dist.errors import ConfigError
from dcft_dist.train.calibrate import temperature

from .test_run import encoder, tiny, train

__all__ = ["encoder", "tiny"]


def test_the_temperature_has_the_lowest_loss() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 5, generator=draw, dtype=torch.float64)
    classes = torch.multinomial(logits.softmax(-1), 1, generator=draw).squeeze(-1)
    found = temperature(7.0 * logits, classes)
    assert 5.0 < found < 10.0  # the labels were drawn from these logits at a temperature of 1
    best = functional.cross_entropy(7.0 * logits / found, classes)
    assert all(functional.cross_entropy(7.0 * logits / (found * factor), classes) > best for factor in (0.98, 1.02))

    findings = torch.bernoulli(logits.sigmoid(), generator=draw)
    findings[::3, 2] = float("nan")
    found, known = temperature(0.2 * logits, findings), ~findings.isnan()

    def loss(number: float) -> torch.Tensor:
        each = functional.binary_cross_entropy_with_logits(0.2 * logits / number, findings.nan_to_num(), reduction="none")
        return each[known].sum()

    assert 0.1 < found < 0.4 and all(loss(found * factor) > loss(found) for factor in (0.98, 1.02))
    right = functional.one_hot(classes, 5) * 4.0
    assert temperature(right, classes) == pytest.approx(0.01)  # nothing is wrong: as sharp as it goes


def test_a_run_is_calibrated_before_its_test(tiny: Path, tmp_path: Path) -> None:
    words = ["--optimizer.lr", "1e-2", "--removal.fractions", "[]", "--train.fall_back", "false"]
    plain = train(tiny, tmp_path, *words, "--engine", "single", "--name", "plain", ranks=1)
    words += ["--train.calibrate", "true"]
    one = train(tiny, tmp_path, *words, "--engine", "single", "--name", "one", ranks=1)
    assert plain["temperature"] is None and one["temperature"] > 1.05
    assert (
        one["validation"]["accuracy"] == plain["validation"]["accuracy"]
        and one["test"]["accuracy"] == plain["test"]["accuracy"]
    )
    assert one["validation"]["loss"] < plain["validation"]["loss"]
    before, after = (load_file(tmp_path / name / "model/head/model.safetensors") for name in ("plain", "one"))
    for name, value in before.items():
        torch.testing.assert_close(after[name] * one["temperature"], value, rtol=1e-5, atol=1e-7)
    assert "divided by the temperature" in (tmp_path / "one/model/README.md").read_text()
    for engine in (["--engine", "fsdp2"], ["--engine", "deepspeed", "--sharding.zero_stage", "3"]):
        two = train(tiny, tmp_path, *words, *engine, "--name", engine[1])
        assert two["temperature"] == pytest.approx(one["temperature"], rel=1e-3)
        assert two["test"]["loss"] == pytest.approx(one["test"]["loss"], rel=1e-3)


BENT = """
import torch


class Bent(torch.nn.Module):
    \"\"\"Its outputs are those of its head, bent.\"\"\"

    def __init__(self, outputs):
        super().__init__()
        self.body, self.head = torch.nn.EmbeddingBag(700, 16), torch.nn.Linear(16, outputs)

    def forward(self, input_ids, attention_mask=None):
        return 30 * torch.tanh(self.head(self.body(input_ids)))
"""


def test_a_head_behind_which_something_follows(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bent_model.py").write_text(BENT)
    monkeypatch.syspath_prepend(str(tmp_path))
    from bent_model import Bent

    weights = shutil.copytree(Path(load_config(str(tiny)).model.weights), tmp_path / "weights")
    save_file(Bent(3).state_dict(), weights / "model.safetensors")
    text = tiny.read_text()
    start = text.index("[model]")
    end = text.find("\n[", start + 1)
    own = f'[model]\nname = "own"\nbuild = "bent_model.Bent"\nargs = {{outputs = "num_outputs"}}\nweights = "{weights}"\n'
    (tmp_path / "bent.toml").write_text(text[:start] + own + (text[end:] if end > 0 else ""))
    words = ["--train.calibrate", "true", "--head_warmup.max_epochs", "0", "--engine", "single", "--method", "full"]
    words += ["--runs_dir", str(tmp_path), "--name", "bent", "--import_roots", f'["{tmp_path}"]', "--optimizer.lr", "1e-2"]
    assert main(["train", str(tmp_path / "bent.toml"), *words]) == 2
    dist.destroy_process_group()
    assert "the model changes what its head returns" in capsys.readouterr().err


def test_what_cannot_be_calibrated(tiny: Path) -> None:
    words = ["--train.calibrate", "true", "--data.path", "x", "--task.kind", "regression"]
    with pytest.raises(ConfigError, match=r"train.calibrate is for task.kind = 'single_label' and 'multi_label'"):
        load_config("medmnist.toml", words)
