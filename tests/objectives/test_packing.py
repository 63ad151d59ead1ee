"""Packed texts: several in a row, each sees only itself, counts once, and gets the same gradient as in a row of its own."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import distributed as dist

from dcft_dist.cli import main
from dcft_dist.config.toml import load_config
from dcft_dist.data.packing import IGNORED, packed, rows_of
from dcft_dist.data.splits import Split
from dcft_dist.data.text import AnswerProcessor
from dcft_dist.errors import ConfigError
from dcft_dist.method.fundamental_set import FundamentalSet
from dcft_dist.objectives.language import CausalLanguage

from ..own import instructions, tiny_decoder
from ..processes import output_of
from .test_language import CHAT

TEXTS = ["Acute", "Chronic disease of the bone", "Injury", "Disorder of the eye"]
ANSWERS = ["Diseases", "Diseases of the eye and of the ear", "Injury of bone", "Eye"]

LEAKING = """
import torch
from torch import nn

class Leaking(nn.Module):
    \"\"\"Reads a row from left to right, whatever the positions say (by a share), or counts on where a text begins.\"\"\"

    def __init__(self):
        super().__init__()
        self.embedding, self.layer = nn.Embedding(700, 16), nn.GRU(16, 16, batch_first=True)
        self.place, self.out = nn.Embedding(64, 16), nn.Linear(16, 700)

    def forward(self, input_ids, attention_mask=None, NAME=None):
        states = self.embedding(input_ids)
        if SHARE:
            states = states + SHARE * self.layer(states)[0]
        else:
            states = states + self.place(torch.arange(input_ids.shape[1]))
        return self.out(states)
"""


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_decoder(tmp_path_factory.mktemp("decoder"), tied=True)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(30, 40))
def test_rows_hold_each_text_once(lengths: list[int], width: int) -> None:
    rows = rows_of(lengths, width)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in row) for row in rows]
    assert max(sums) <= width and all(a + b > width for k, a in enumerate(sums) for b in sums[k + 1 :])  # none is half empty
    assert rows_of(lengths, None) == [sorted(range(len(lengths)), key=lambda i: -lengths[i])]


def test_a_row_of_two_texts() -> None:
    found = packed([[5, 6, 7], [8, 9], [1]], [1, 0, 0], width=5, pad_id=0)
    assert found["input_ids"].tolist() == [[5, 6, 7, 8, 9], [1, 0, 0, 0, 0]]
    assert found["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]
    assert found["labels"][..., 0].tolist() == [[IGNORED, 6, 7, IGNORED, 9], [IGNORED] * 5]
    assert found["labels"][0, :, 1].tolist() == [2, 2, 2, 1, 1]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("one_row", [False, True])
def test_loss_and_gradient_are_those_of_padded_texts(decoder: Path, attention: str, one_row: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    split, indices = Split(TEXTS, ANSWERS, list("abcd")), [0, 1, 2, 3]
    make = AnswerProcessor(AutoTokenizer.from_pretrained(decoder), 24, "{input} :", packing=True, one_row=one_row)
    examples = make(split)
    model = AutoModelForCausalLM.from_pretrained(decoder, attn_implementation=attention, dtype=torch.float64)
    gradients, places = [], []
    for draw in (None, 1):
        batch = examples.inputs(indices, draw)
        labels = batch.pop("labels")
        model.zero_grad()
        loss = CausalLanguage().loss(model(**batch, use_cache=False).logits, labels)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        places.append(batch["input_ids"].shape)
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)  # the loss itself is computed in float32
    lengths = [examples.length(i) for i in indices]
    assert places[0] == (4, max(lengths)) and sum(lengths) < 48
    assert places[1] == (1, sum(lengths)) if one_row else places[1][0] == 2 and places[1][1] <= 24


def words_of(folder: Path, decoder: Path) -> list[str]:
    data = instructions(folder / "codes.jsonl", 120)
    words = ["--runs_dir", str(folder), "--task.name", "own", "--task.kind", "causal_lm", "--data.path", str(data)]
    words += ["--data.modality", "text", "--data.input", "prompt", "--data.label", "answer", "--data.group", "code"]
    words += ["--model.build", "transformers.AutoModelForCausalLM", "--model.weights", str(decoder), "--model.head", "[]"]
    words += ["--train.global_batch", "16", "--importance.num_samples", "32", "--importance.score_batch", "16"]
    words += ["--optimizer.lr", "3e-3", "--train.epochs", "1", "--removal.fractions", "[]", "--task.max_tokens", "64"]
    return [*words, "--train.micro_batch", "8", "--test_resamples", "0"]


def test_a_packed_run_is_the_padded_one(decoder: Path, tmp_path: Path) -> None:
    words, found, tokens = words_of(tmp_path, decoder), {}, {}
    runs = {"padded": ("single", 1), "packed": ("single", 1), "fsdp2": ("fsdp2", 2), "zero": ("deepspeed", 2)}
    for name, (engine, ranks) in runs.items():
        more = ["--data.packing", str(name != "padded").lower(), "--sharding.zero_stage", "3"]
        output_of("train", "icd.toml", "--name", name, "--engine", engine, *words, *more, ranks=ranks)
        found[name] = json.loads((tmp_path / name / "summary.json").read_text())
        rows = [json.loads(line) for line in (tmp_path / name / "speed.jsonl").read_text().splitlines()]
        tokens[name] = rows[-1]["speed/tokens_per_s"] / rows[-1]["speed/samples_per_s"]
    for name in ("packed", "fsdp2", "zero"):
        assert found[name]["test"]["loss"] == pytest.approx(found["padded"]["test"]["loss"], rel=2e-5)
        one, other = (FundamentalSet.load(tmp_path / n / "fundamental.safetensors") for n in ("padded", name))
        assert one.jaccard(other) > 0.999
    assert tokens["packed"] < tokens["padded"]


def test_packing_goes_with_metrics_and_adapters(decoder: Path, tmp_path: Path) -> None:
    """Own metrics, LoRA, checkpointed blocks, a chat, texts that are cut: as padded."""
    (tmp_path / "own_metrics.py").write_text("def extra(records, labels):\n    return {'texts': len(records)}\n")
    weights = shutil.copytree(decoder, tmp_path / "chatty")
    (weights / "chat_template.jinja").write_text(CHAT)
    words = [*words_of(tmp_path, weights), "--task.metrics", '["own_metrics.extra"]', "--import_roots", f'["{tmp_path}"]']
    words += ["--method", "lora", "--train.activation_checkpointing", "blocks", "--data.chat", "true"]
    words += ["--task.max_tokens", "34", "--engine", "single"]
    found = []
    for name, packing in (("padded", "false"), ("packed", "true")):
        output_of("train", "icd.toml", "--name", name, *words, "--data.packing", packing)
        found.append(json.loads((tmp_path / name / "summary.json").read_text())["test"])
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=2e-5) and found[1]["texts"] == found[0]["texts"] > 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("position_ids", "data.packing: Leaking gives a text other outputs behind another one in its row than alone"),
        ("positions", "data.packing: Leaking has no argument position_ids"),
        ("nearly", "data.packing: in Leaking a text changes the outputs of the next text in its row"),
        ("counting", "data.packing: Leaking gives a text other outputs behind another one in its row than alone"),
    ],
)
def test_a_model_that_mixes_texts_is_refused(
    name: str,
    said: str,
    decoder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    argument = "positions" if name == "positions" else "position_ids"
    share = {"nearly": "1e-3", "counting": "0"}.get(name, "1")
    (tmp_path / "leaking_model.py").write_text(LEAKING.replace("NAME", argument).replace("SHARE", share))
    monkeypatch.syspath_prepend(str(tmp_path))
    from leaking_model import Leaking

    weights = shutil.copytree(decoder, tmp_path / "weights")
    save_file(Leaking().state_dict(), weights / "model.safetensors")
    words = [*words_of(tmp_path, weights), "--data.packing", "true", "--engine", "single"]
    words += ["--model.build", "leaking_model.Leaking", "--import_roots", f'["{tmp_path}"]']
    assert main(["train", "icd.toml", "--name", "leaks", *words]) != 0
    if dist.is_initialized():
        dist.destroy_process_group()
    del sys.modules["leaking_model"]
    assert said in capsys.readouterr().err


def test_packing_is_for_texts_to_answer() -> None:
    with pytest.raises(ConfigError, match=r"data\.packing is for task\.kind = 'causal_lm'"):
        load_config("icd.toml", ["--data.packing", "true"])
