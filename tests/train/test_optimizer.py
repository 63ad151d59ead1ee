"""Optimizers, schedules and groups of weights: the library's own steps, under every engine, through interruptions."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from dcft_dist.cli import main
from dcft_dist.config.schema import Config
from dcft_dist.config.toml import load_config
from dcft_dist.config.trust import named_code
from dcft_dist.errors import ConfigError, PatternError
from dcft_dist.files import read_lines
from dcft_dist.models.pretrained import Pretrained
from dcft_dist.train.optimizer import lr_scale, make_optimizer, rates_of

from .test_methods import pretrained
from .test_pull_run import same, same_course
from .test_run import encoder, tiny, train

__all__ = ["encoder", "tiny"]


def config_of(*words: str) -> Config:
    return load_config("smoke.toml", ["--method", "full", "--engine", "single", *words])


def optimizer_of(net: Pretrained, *words: str) -> torch.optim.Optimizer:
    config = config_of(*words)
    weights = [(n, p, p.ndim > 1) for n, p in net.module.named_parameters()]
    return make_optimizer(weights, config, rates_of(net, config))


# -- rates -------------------------------------------------------------------------------------------------------------


def test_layer_wise_rates_fall_from_the_top_block_by_block() -> None:
    net = pretrained()
    optimizer = optimizer_of(net, "--optimizer.lr", "1e-3", "--optimizer.layer_decay", "0.5")
    rates = {id(p): group["peak_lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name.rpartition(".")[0]: rates[id(p)] for name, p in net.module.named_parameters()}
    assert len(rates) == len(list(net.module.parameters()))
    assert {name: found[name] for name in ("head", "above", "blocks.2.0", "blocks.1.1", "blocks.0.0", "below")} == {
        "head": 1e-3,
        "above": 1e-3,
        "blocks.2.0": 1e-3,
        "blocks.1.1": 5e-4,
        "blocks.0.0": 2.5e-4,
        "below": 1.25e-4,
    }


GROUPS = """[
    {pattern = "blocks.0.*", lr_scale = 0.1, weight_decay = 0.5},
    {pattern = "blocks", lr_scale = 0.0},
    {pattern = "head", weight_decay = 0.0},
]"""


def test_a_weight_belongs_to_the_first_group_that_matches_it() -> None:
    words = ["--optimizer.lr", "1e-3", "--optimizer.head_lr", "1e-2", "--optimizer.weight_decay", "0.1"]
    rates = rates_of(pretrained(), config_of(*words, "--optimizer.groups", GROUPS))
    found = {name: (r.peak_lr, r.weight_decay, r.in_head) for name, r in rates.items()}
    assert found["blocks.0.0.weight"] == found["blocks.0.1.bias"] == (1e-4, 0.5, False)  # vectors too
    assert found["blocks.1.0.weight"] == (0.0, 0.1, False) and found["blocks.1.0.bias"] == (0.0, 0.0, False)
    assert found["head.weight"] == (1e-2, 0.0, True) and found["below.weight"] == (1e-3, 0.1, False)
    with pytest.raises(PatternError, match=r"optimizer.groups pattern 'blok' matches no parameter"):
        rates_of(pretrained(), config_of("--optimizer.groups", '[{pattern = "blok"}]'))


def test_weight_decay_of_a_group_decides_the_level() -> None:
    sgd = ["--method", "dcft", "--optimizer.name", "sgd"]
    assert config_of(*sgd).level == "gradient"
    assert config_of(*sgd, "--optimizer.groups", '[{pattern = "head", weight_decay = 0.1}]').level == "update"


def test_inspect_shows_the_rates(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--optimizer.lr", "1e-3", "--optimizer.groups", '[{pattern = "backbone.embeddings", lr_scale = 0.1}]']
    assert main(["inspect", str(tiny), *words]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["shape", "group", "lr", "decay", "name"]
    assert next(x[-3:-1] for x in lines if x and x[-1].endswith("word_embeddings.weight")) == ["0.0001", "0"]
    assert next(x[-3:-1] for x in lines if x and x[-1] == "head.weight") == ["0.001", "0"]


# -- schedules ---------------------------------------------------------------------------------------------------------


def test_schedules_are_those_of_transformers() -> None:
    """After the warm-up; that of transformers begins with a step of rate 0."""
    total, parameter = 40, [torch.zeros(1, requires_grad=True)]

    def theirs(make: Any, **options: Any) -> list[float]:
        optimizer = torch.optim.SGD(parameter, lr=1.0)
        schedule = make(optimizer, num_warmup_steps=0, **options)
        rates = []
        for _ in range(total):
            rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return rates

    def ours(*words: str) -> list[float]:
        config = config_of("--train.warmup_fraction", "0", *words)
        return [lr_scale(config, step, total) for step in range(total)]

    cosine = theirs(get_cosine_with_min_lr_schedule_with_warmup, num_training_steps=total, min_lr_rate=0.1)
    assert ours("--train.final_lr_fraction", "0.1") == pytest.approx(cosine)
    linear = theirs(get_linear_schedule_with_warmup, num_training_steps=total)
    assert ours("--train.schedule", "linear") == pytest.approx(linear)
    wsd = theirs(get_wsd_schedule, num_decay_steps=10, num_stable_steps=30, decay_type="linear", min_lr_ratio=0.2)
    decay = ["--train.decay_fraction", "0.25", "--train.final_lr_fraction", "0.2"]
    assert ours("--train.schedule", "wsd", *decay) == pytest.approx(wsd)
    assert ours("--train.schedule", "constant") == [1.0] * total
    warm = config_of("--train.schedule", "wsd", "--train.warmup_fraction", "0.1")
    assert [lr_scale(warm, step, total) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


# -- optimizers by import path -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "make"),
    [
        (["--optimizer.betas", "[0.8, 0.95]", "--optimizer.eps", "1e-4"],
         lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1, fused=True)),
        (["--optimizer.build", "torch.optim.NAdam", "--optimizer.args", "{betas = [0.8, 0.95], momentum_decay = 1e-3}"],
         lambda p: torch.optim.NAdam(p, lr=1e-2, betas=(0.8, 0.95), momentum_decay=1e-3, weight_decay=0.1)),
    ],
)  # fmt: skip
def test_steps_are_those_of_the_library(words: list[str], make: Any) -> None:
    """Its own loop, bit for bit."""
    ours, theirs = pretrained(), pretrained()
    groups = '[{pattern = "*", weight_decay = 0.1}]'
    optimizer = optimizer_of(ours, "--optimizer.lr", "1e-2", "--optimizer.groups", groups, *words)
    plain = make(theirs.module.parameters())
    for step in range(4):
        inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        for net, one in ((ours, optimizer), (theirs, plain)):
            one.zero_grad()
            net.module(inputs).square().mean().backward()
            one.step()
    for (name, mine), yours in zip(ours.module.named_parameters(), theirs.module.parameters(), strict=True):
        assert torch.equal(mine, yours), name


OWN = '''
import torch


class Counting(torch.optim.Optimizer):
    """Sign steps that shrink by counts of its own: a number in the group, numbers and a tensor in the state."""

    def __init__(self, params, lr, scale=1.0):
        super().__init__(params, dict(lr=lr, scale=scale, taken=0, bounds=(0.5, 1.5)))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["taken"] += 1
            group["bounds"] = (0.5, group["bounds"][1] + 0.1)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(seen=0, rate=1.0, first=True, mean=torch.zeros_like(p))
                state["seen"] += 1
                state["rate"] *= 0.9
                state["mean"].lerp_(p.grad, 0.3 if not state["first"] else 1.0)
                state["first"] = False
                size = group["lr"] * group["scale"] * state["rate"] / (group["taken"] + state["seen"]) * group["bounds"][1]
                p.sub_(state["mean"].tanh(), alpha=size)


class Scaled(torch.optim.SGD):
    """Every step of a tensor has the length lr: it looks at whole tensors."""

    def __init__(self, params, lr, weight_decay=0.0):
        super().__init__(params, lr=lr, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.div_(p.grad.norm() + 1e-6)
        super().step()


class Rows(torch.optim.SGD):
    def step(self):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["rows"] = p.grad.mean(-1)


class Needy(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


class Modes(torch.optim.SGD):
    def eval(self):
        pass


class Ticking(torch.optim.SGD):
    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.ticks = 0

    def step(self):
        self.ticks += 1
        super().step()


def adamw(params, lr, **more):
    return torch.optim.AdamW(params, lr=lr, **more)


def secretly(params, lr):
    return torch.optim.AdamW(params, lr=lr)


def nothing(params, lr):
    return params
'''


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("optimizers")
    (folder / "own_steps.py").write_text(OWN)
    return ["--import_roots", f'["{folder}"]']


@pytest.mark.parametrize(
    ("build", "said"),
    [
        ("torch.optim.Adamm", "torch.optim has no Adamm .did you mean 'Adam'"),
        ("torch.optim.Muon", "torch.optim.Muon fails: ValueError: Muon only supports 2D parameters"),
        ("torch.optim.Rprop", "torch.optim.Rprop has no weight decay: set optimizer.weight_decay = 0"),
        ("torch.optim.Adafactor", "keeps 'row_var', of shape .8, 1. for a weight of shape .8, 6., which a checkpoint"),
        ("own_steps.Rows", "keeps 'rows', of shape .8. for a weight of shape .8, 6."),
        ("own_steps.Needy", "needs a closure for its step"),
        ("own_steps.Modes", "has a mode for evaluation"),
        ("own_steps.Ticking", "counts in its own attribute 'ticks'"),
        ("own_steps.secretly", "sets a weight decay of 0.01 where 0.0 was asked for"),
        ("own_steps.nothing", "makes a list, not a torch.optim.Optimizer"),
    ],
)
def test_what_cannot_be_used_is_refused(build: str, said: str, own: list[str]) -> None:
    decay = "0.1" if build.startswith("torch") else "0"
    with pytest.raises(ConfigError, match=said):
        optimizer_of(pretrained(), *own, "--optimizer.build", build, "--optimizer.weight_decay", decay)


def test_a_builder_with_any_arguments_gets_the_weight_decay(own: list[str]) -> None:
    for decay in ("0", "0.2"):
        words = [*own, "--optimizer.build", "own_steps.adamw", "--optimizer.weight_decay", decay]
        groups = optimizer_of(pretrained(), *words).param_groups
        assert {group["weight_decay"] for group in groups} == {0.0, float(decay)}


def test_a_state_before_the_first_step_cannot_be_flattened() -> None:
    words = ["--optimizer.build", "torch.optim.Adagrad", "--engine", "deepspeed"]
    with pytest.raises(ConfigError, match="has a state before its first step, which the engine deepspeed would not flatten"):
        optimizer_of(pretrained(), *words)
    optimizer_of(pretrained(), *words, "--sharding.zero_stage", "0")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--optimizer.build", "torch.optim.NAdam", "--optimizer.args", "{weight_decay = 1}"], "weight_decay has a key"),
        (["--optimizer.name", "own"], "name = 'own' needs build"),
        (["--optimizer.args", "{a = 1}"], "args are for an optimizer of `build`"),
        (["--optimizer.build", "torch.optim.NAdam", "--optimizer.momentum", "0.9"], "momentum does nothing for torch.optim"),
        (["--optimizer.name", "sgd", "--optimizer.eps", "0.1"], "eps does nothing for sgd"),
        (["--optimizer.groups", '[{pattern = "head", lr_scael = 1}]'], "groups.0.lr_scael: unknown key .did you mean"),
        (["--train.schedule", "wsd", "--train.decay_fraction", "0.95"], "more than all steps together"),
    ],
)  # fmt: skip
def test_keys_that_do_not_fit(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_of(*words)


def test_code_of_an_optimizer_needs_the_users_word(own: list[str]) -> None:
    assert not named_code(config_of("--optimizer.build", "torch.optim.NAdam", "--optimizer.args", "{eps = 1e-3}"))
    assert any(
        "own_steps.Counting" in said for said in named_code(config_of(*own, "--optimizer.build", "own_steps.Counting"))
    )


# -- in runs -----------------------------------------------------------------------------------------------------------

ENGINES: dict[str, tuple[int, list[str]]] = {
    "fsdp2": (2, ["--engine", "fsdp2"]),
    "zero3": (2, ["--engine", "deepspeed", "--sharding.zero_stage", "3"]),
}


def test_a_run_with_an_optimizer_of_another_name(tiny: Path, tmp_path: Path) -> None:
    """NAdam with groups and another schedule: the same weights alone and on two ranks, with a penalty."""
    words = ["--optimizer.build", "torch.optim.NAdam", "--train.schedule", "wsd", "--train.fall_back", "false"]
    words += ["--optimizer.groups", '[{pattern = "backbone.embeddings", lr_scale = 0.1, weight_decay = 0.1}]']
    words += ["--optimizer.lr", "1e-3", "--removal.fractions", "[]"]
    summary = train(tiny, tmp_path, *words, "--engine", "single", "--name", "one", ranks=1)
    assert (summary["optimizer"], summary["level"]) == ("torch.optim.NAdam", "update")
    for engine, (ranks, more) in ENGINES.items():
        train(tiny, tmp_path, *words, *more, "--name", engine, ranks=ranks)
        same(tmp_path / "one", tmp_path / engine)


def test_an_optimizers_own_counts_survive_a_kill_and_another_number_of_ranks(
    tiny: Path, tmp_path: Path, own: list[str]
) -> None:
    words = [*own, "--optimizer.build", "own_steps.Counting", "--optimizer.lr", "1e-2", "--train.fall_back", "false"]
    words += ["--method", "full", "--removal.fractions", "[]", "--checkpoint.keep_last", "9"]
    train(tiny, tmp_path, *words, "--engine", "fsdp2")
    run, whole, moved = (tmp_path / name for name in ("tiny", "whole", "moved"))
    shutil.copytree(run, whole)
    for folder in sorted((run / "checkpoints").glob("*_*")):
        if int(folder.name.rpartition("_")[2]) > 5:
            shutil.rmtree(folder)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "model")
    shutil.copytree(run, moved)
    train(tiny, tmp_path, *words, "--engine", "fsdp2")
    assert read_lines(run / "attempts.jsonl")[-1]["at"] == "step 5"
    same_course(whole, run)
    train(tiny, tmp_path, *words, "--engine", "deepspeed", "--name", "moved", ranks=1)
    assert read_lines(moved / "attempts.jsonl")[-1]["at"] == "step 5"
    same_course(whole, moved, rel=1e-4)


def test_an_optimizer_of_whole_tensors(tiny: Path, tmp_path: Path, own: list[str]) -> None:
    """FSDP2 shows it whole tensors, so it makes the same steps there; ZeRO does not, and is refused."""
    words = [*own, "--optimizer.build", "own_steps.Scaled", "--optimizer.lr", "1e-2", "--train.fall_back", "false"]
    words += ["--method", "full", "--removal.fractions", "[]"]
    train(tiny, tmp_path, *words, "--engine", "single", "--name", "one", ranks=1)
    train(tiny, tmp_path, *words, "--engine", "fsdp2", "--name", "two")
    same(tmp_path / "one", tmp_path / "two")
    with pytest.raises(AssertionError, match="looks at whole tensors, and the engine deepspeed gives it parts of them"):
        train(tiny, tmp_path, *words, "--engine", "deepspeed", "--name", "three")
