"""Causal language models: only answers count, and a whole run of a decoder on instructions."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from dcft_dist.config.toml import load_config
from dcft_dist.data.packing import IGNORED
from dcft_dist.data.splits import Split
from dcft_dist.data.text import AnswerProcessor
from dcft_dist.errors import ConfigError, DataError
from dcft_dist.objectives.language import CausalLanguage

from ..own import instructions, tiny_decoder
from ..processes import dcft, output_of


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_decoder(tmp_path_factory.mktemp("decoder"), tied=True)


def test_only_answers_are_learned(decoder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(decoder)
    split = Split(["Acute", "Chronic disease of the bone"], ["Diseases", "Diseases of the eye"], ["a", "b"])
    batch = AnswerProcessor(tokenizer, 20, "{input} :")(split).inputs([0, 1])
    assert batch["labels"].shape == batch["input_ids"].shape == batch["attention_mask"].shape
    for row, answer in zip(batch["labels"], split.labels, strict=True):
        assert tokenizer.decode(row[row != IGNORED]) == f"{answer} </s>"
    assert [int(n) for n in batch["attention_mask"].sum(-1)] == [4, 11] and int(batch["input_ids"][0, 4]) == 3
    with pytest.raises(DataError, match="1 instructions leave no room for an answer in 5 tokens, such as 'Chronic disease"):
        AnswerProcessor(tokenizer, 5, "{input} :")(split)


CHAT = "{% for m in messages %}< {{ m.role }} > {{ m.content }} </s> {% endfor %}"
CHAT += "{% if add_generation_prompt %}< assistant > {% endif %}"


def test_a_chat_is_learned_from_the_answer_on(decoder: Path) -> None:
    """As transformers writes the chat; the turn of the assistant alone has labels."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(decoder)
    split = Split(["Acute", "Chronic disease of the bone"], ["Diseases", "Diseases of the eye"], ["a", "b"])
    with pytest.raises(ConfigError, match=r"data.chat: the tokenizer has no chat template"):
        AnswerProcessor(tokenizer, 40, "", chat=True)
    tokenizer.chat_template = CHAT
    processor = AnswerProcessor(tokenizer, 40, "", chat=True, system="Answer")
    batch = processor(split).inputs([0, 1])
    for i, (text, answer) in enumerate(zip(split.inputs, split.labels, strict=True)):
        turns = [("system", "Answer"), ("user", text), ("assistant", answer)]
        messages = [{"role": role, "content": content} for role, content in turns]
        whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert batch["input_ids"][i][batch["attention_mask"][i] > 0].tolist() == whole
        learned = batch["labels"][i][batch["labels"][i] != IGNORED].tolist()
        assert whole[-len(learned) :] == learned
        assert tokenizer.decode(learned) == f"{answer} </s>"
        (prompt,) = processor.prompts(Split([text], [answer], [""]))
        assert prompt == whole[: -len(learned)]
    assert "answer of" in processor.describe("Acute", "Diseases")
    tokenizer.chat_template = CHAT.replace("{% for", "{{ messages | length }} {% for")
    with pytest.raises(DataError, match="it is not known where the answer begins"):
        processor(split)
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(DataError, match="the tokenizer's template refuses a chat: no system here"):
        processor(split)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data.system", "x"], "system is for chat = true"),
        (["--data.chat", "true", "--data.template", "Q {input} A "], "chat = true uses the tokenizer's template"),
    ],
)
def test_keys_of_a_chat(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config("instructions_7b.toml", words)


def test_losses_are_means_over_answers_and_metrics_over_tokens() -> None:
    torch.manual_seed(0)
    outputs, labels = torch.randn(2, 5, 7), torch.full((2, 5), IGNORED)
    labels[0, 3:], labels[1, 1:4] = torch.tensor([2, 4]), torch.tensor([0, 6, 1])
    wanted = [
        functional.cross_entropy(outputs[0, 2:4], labels[0, 3:5]),
        functional.cross_entropy(outputs[1, 0:3], labels[1, 1:4]),
    ]
    objective = CausalLanguage()
    torch.testing.assert_close(objective.losses(outputs, labels), torch.stack(wanted))
    found = objective.metrics(objective.records(outputs, labels), labels)
    assert found["loss"] == pytest.approx(float(sum(wanted) / 2))
    assert found["perplexity"] == pytest.approx(math.exp(float(2 * wanted[0] + 3 * wanted[1]) / 5))
    right = [(outputs[0, 2:4].argmax(-1) == labels[0, 3:]).sum(), (outputs[1, :3].argmax(-1) == labels[1, 1:4]).sum()]
    assert found["token_accuracy"] == pytest.approx(float(sum(right)) / 5)


def test_a_run_on_instructions(decoder: Path, tmp_path: Path) -> None:
    """Under one process and under FSDP2 on two ranks the same; the export is what transformers reads."""
    data = instructions(tmp_path / "codes.jsonl", 200)
    words = ["--runs_dir", str(tmp_path), "--task.name", "own", "--task.kind", "causal_lm", "--data.path", str(data)]
    words += ["--data.modality", "text", "--data.input", "prompt", "--data.label", "answer", "--data.group", "code"]
    words += ["--model.build", "transformers.AutoModelForCausalLM", "--model.weights", str(decoder), "--model.head", "[]"]
    words += ["--train.global_batch", "16", "--importance.num_samples", "32", "--importance.score_batch", "16"]
    words += ["--optimizer.lr", "3e-3", "--train.epochs", "2", "--removal.fractions", "[0.1]", "--task.max_tokens", "64"]
    words += ["--train.micro_batch", "8", "--train.evaluation_batch", "8", "--test_resamples", "10"]
    found = {}
    for name, ranks in (("single", 1), ("fsdp2", 2)):
        output_of("train", "icd.toml", "--name", name, "--engine", name, *words, ranks=ranks)
        found[name] = json.loads((tmp_path / name / "summary.json").read_text())
    one, two = found["single"], found["fsdp2"]
    assert one["num_selected"] == two["num_selected"] == round(0.1 * one["num_eligible"])
    assert two["test"]["loss"] == pytest.approx(one["test"]["loss"], rel=1e-4)
    rows = [json.loads(line) for line in (tmp_path / "single/metrics.jsonl").read_text().splitlines()]
    losses = [row["validation/loss"] for row in rows if "validation/loss" in row]
    assert losses[-1] < losses[0] - 0.1 and one["best_epoch"] > 0
    assert one["test"].keys() == {"loss", "perplexity", "token_accuracy", "exact"} and one["test_intervals"]["perplexity"]
    for name in ("single", "fsdp2"):  # built on the meta device, and tied again by whoever reads the export
        check_export(tmp_path / name / "model", tmp_path / name)
    evaluated = json.loads(output_of("evaluate", tmp_path / "single", "--data.path", data))
    assert evaluated["examples"] == 200 and evaluated["metrics"]["perplexity"] > 1
    check_answers(tmp_path, data)


def check_answers(runs: Path, data: Path) -> None:
    """What `dcft predict` says on any number of ranks is what transformers says, given one instruction."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [json.loads(line) for line in data.read_text().splitlines()[:5]]
    asked = runs / "asked.jsonl"  # without answers, and of lengths that need padding
    asked.write_text("\n".join(json.dumps({"prompt": row["prompt"], "code": row["code"]}) for row in rows))
    answers = {}
    for engine, ranks in (("single", 1), ("fsdp2", 2), ("deepspeed", 2), ("fsdp1", 2)):
        words = ["predict", runs / "single", "--tokens", "12", "--data.path", asked, "--engine", engine]
        words += ["--sharding.zero_stage", "3", "--train.evaluation_batch", "2"]  # three batches
        done = dcft(*words, "--out", runs / f"{engine}.csv", ranks=ranks)
        if engine == "fsdp1":
            assert done.returncode and "generate bypasses the hooks of FSDP1: use --engine fsdp2" in done.stderr
            continue
        assert done.returncode == 0, done.stderr
        answers[engine] = list(csv.DictReader((runs / f"{engine}.csv").open()))
    assert answers["single"] == answers["fsdp2"] == answers["deepspeed"]
    folder = runs / "single/model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    template = load_config("icd.toml").data.template
    for row, found in zip(rows, answers["single"], strict=True):
        ids = tokenizer(template.replace("{input}", row["prompt"]), return_tensors="pt").input_ids
        wanted = model.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=2, pad_token_id=3)
        text = tokenizer.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True)
        assert found == {"input": row["prompt"], "group": row["code"], "answer": text.strip()} and text


def check_export(folder: Path, run: Path) -> None:
    """transformers alone reads it, and its own loss on a test example is the run's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dcft_dist.data.tasks import load_task

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in load_file(folder / "model.safetensors").items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    config = load_config(run / "config.toml")
    test = load_task(config).test
    batch = AnswerProcessor(tokenizer, 64, config.data.template)(test).inputs(range(len(test)))
    with torch.no_grad():
        outputs = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = CausalLanguage().losses(outputs, batch["labels"]).mean()
    assert float(loss) == pytest.approx(json.loads((run / "summary.json").read_text())["test"]["loss"], abs=1e-5)
