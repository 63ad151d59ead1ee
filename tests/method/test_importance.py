"""Scores equal their formulas, do not depend on the number of ranks, and leave everything as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from dcft_dist import load_scores, save_scores, score_importance, select_fundamental
from dcft_dist.engines.names import as_patterns
from dcft_dist.errors import EngineError, PatternError, ScoreError
from dcft_dist.method.scores import Scores

from ..nets import HEAD, full_state, loss_fn, make_batches, make_net, make_optimizer, my_part, wrap
from ..ranks import run_ranks

CRITERIA = ["taylor", "taylor_squared", "removal", "fisher", "magnitude"]
ELIGIBLE = ["blocks.*.up.weight", "blocks.*.down.weight", "conv.weight", "encode.weight", "mix.weight", "unused.weight"]
NUM, SIZE = 3, 8  # score batches, samples in each


def formula(net: nn.Module, batches: list[Any], criterion: str) -> dict[str, Tensor]:
    """The definitions of the documentation, by autograd on whole batches in one process."""
    net.eval()
    sums: dict[str, list[Tensor]] = {}
    names = [n for n, p in net.named_parameters() if p.requires_grad]
    weights = [net.get_parameter(n) for n in names]
    for batch in batches:
        gradients = torch.autograd.grad(loss_fn(net, batch), weights, allow_unused=True)
        for name, weight, g in zip(names, weights, gradients, strict=True):
            sums.setdefault(name, []).append(torch.zeros_like(weight) if g is None else g)
    out = {}
    for name, weight in zip(names, weights, strict=True):
        g = torch.stack(sums[name])
        w = weight.detach()
        out[name] = {
            "taylor": (g.mean(0) * w).abs(),
            "taylor_squared": (g * w).square().mean(0),
            "removal": -g.mean(0) * w + 0.5 * g.square().mean(0) * w.square(),
            "fisher": g.square().mean(0),
            "magnitude": w.abs(),
        }[criterion]
    return out


@pytest.mark.parametrize(("dtype", "count"), [(torch.float16, 40000), (torch.uint8, 200)])
def test_counts_of_a_small_type(dtype: torch.dtype, count: int) -> None:
    """Two items: the sum of their counts is beyond what the type can hold."""
    batches = make_batches(2, SIZE, torch.float32)

    def sums(make: Any) -> Scores:
        return score_importance(make_net(), batches, lambda m, b: (loss_fn(m, b), make(count)), head=HEAD, accumulation=2)

    expected, found = sums(float), sums(lambda n: torch.tensor(n, dtype=dtype))
    assert found.loss == expected.loss
    for name, shard in expected.shards.items():
        assert torch.equal(found.shards[name].values, shard.values)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_equals_formula(criterion: str) -> None:
    batches = make_batches(NUM, SIZE, torch.float64)
    scores = score_importance(make_net(torch.float64), batches, loss_fn, head=HEAD, criterion=criterion)  # type: ignore[arg-type]
    assert list(scores.shapes) == [
        "conv.weight", "encode.weight", "blocks.0.up.weight", "blocks.0.down.weight", "blocks.1.up.weight",
        "blocks.1.down.weight", "unused.weight", "mix.weight",
    ]  # fmt: skip
    expected = formula(make_net(torch.float64), batches, criterion)
    for name, shard in scores.shards.items():
        wanted = expected[name].reshape(-1).float()  # sums of both signs cancel: judged by the largest
        torch.testing.assert_close(shard.values, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


def test_sorts_the_weights() -> None:
    scores = score_importance(make_net(), None, None, head=["head"], criterion="magnitude")
    net = make_net()
    assert scores.frozen == ("frozen.weight", "frozen.bias")
    assert scores.head == ("head",)
    head = {"head.weight", "head.bias"}
    assert {*scores.shapes, *scores.unscored} == {n for n, _ in net.named_parameters()} - head
    assert "frozen.weight" in scores.unscored and "blocks.0.norm.weight" in scores.unscored
    assert scores.num_weights == sum(p.numel() for p in net.parameters())


def test_tied_alias_means_the_same_weight() -> None:
    net = make_net()
    named = score_importance(net, None, None, head=(), criterion="magnitude", eligible=["decode.weight"])
    assert list(named.shapes) == ["encode.weight"]
    as_head = score_importance(net, None, None, head=["decode"], criterion="magnitude")
    assert "encode.weight" not in as_head.shapes and "encode.weight" not in as_head.unscored


def sum_and_count(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, reduction="sum"), len(y)


def score_everywhere(engine: str, dtype: torch.dtype) -> Any:
    """Sets and scores under an engine: mean losses, (sum, count) over unequal parts, and accumulation."""
    out: dict[str, Any] = {}
    batches = [my_part(b) for b in make_batches(NUM, SIZE, dtype)]
    for criterion in [*CRITERIA, "random"]:
        model = wrap(make_net(dtype), engine)
        scores = score_importance(model, batches, loss_fn, head=HEAD, criterion=criterion)  # type: ignore[arg-type]
        found = select_fundamental(scores, 0.3)
        out[criterion] = {n: found.mask(n) for n in found.names}
        owned = sum(s.values.numel() * s.values.element_size() for s in scores.shards.values())
        out["bytes"] = owned, 4 * scores.num_eligible
    halves = [(x[i::2], y[i::2]) for x, y in batches for i in (0, 1)]
    removal: Any = {"head": HEAD, "criterion": "removal"}
    accumulated = score_importance(wrap(make_net(dtype), engine), halves, loss_fn, accumulation=2, **removal)
    out["accumulated"] = masks(accumulated)
    out["thresholds"] = [select_fundamental(accumulated, 0.3).threshold]  # the scale of the scores, which no set shows
    rank, ranks = dist.get_rank(), dist.get_world_size()
    uneven = [uneven_part(b, rank, ranks) for b in make_batches(NUM, SIZE, dtype)]
    summed = score_importance(wrap(make_net(dtype), engine), uneven, sum_and_count, **removal)
    out["uneven"] = masks(summed)
    out["thresholds"].append(select_fundamental(summed, 0.3).threshold)
    return out


def uneven_part(batch: tuple[Tensor, Tensor], rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    x, y = batch
    first = len(x) - (ranks - 1)  # rank 0 gets what the others leave: they have one sample each
    begin, end = (0, first) if rank == 0 else (first + rank - 1, first + rank)
    return x[begin:end], y[begin:end]


def masks(scores: Scores) -> dict[str, Tensor]:
    found = select_fundamental(scores, 0.3)
    return {n: found.mask(n) for n in found.names}


@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp2"])
def test_same_set_for_every_number_of_ranks(engine: str) -> None:
    """In float64; a plain module on several ranks counts as replicated."""
    expected = run_ranks(1, score_everywhere, "single", torch.float64)[0]
    for ranks in (2, 4):
        found = run_ranks(ranks, score_everywhere, engine, torch.float64)
        for out in found:
            assert out["thresholds"] == pytest.approx(expected["thresholds"][:1] * 2, rel=1e-6)
            for case in [*CRITERIA, "random", "accumulated", "uneven"]:
                reference = expected["removal" if case in ("accumulated", "uneven") else case]
                for name, mask in reference.items():
                    assert torch.equal(out[case][name], mask), (ranks, case, name)
        # 4 bytes x weights / ranks: together exactly every eligible weight once, and no rank much more than its share.
        assert sum(out["bytes"][0] for out in found) == found[0]["bytes"][1]
        assert max(out["bytes"][0] for out in found) <= 1.4 * found[0]["bytes"][1] / ranks


def jaccards(dtype_name: str) -> Any:
    bf16 = dtype_name == "bf16"
    batches = [my_part(b) for b in make_batches(NUM, SIZE, torch.float32)]
    model = wrap(make_net(), "fsdp2", bf16=bf16)
    loss = (lambda m, b: nn.functional.cross_entropy(m(b[0]).float(), b[1])) if bf16 else loss_fn
    return masks(score_importance(model, batches, loss, head=HEAD))


@pytest.mark.parametrize("dtype_name", ["fp32", "bf16"])
def test_jaccard_between_numbers_of_ranks(dtype_name: str, record_property: Any) -> None:
    one, two = run_ranks(1, jaccards, dtype_name)[0], run_ranks(2, jaccards, dtype_name)[0]
    both = sum(int((one[n] & two[n]).sum()) for n in one)
    either = sum(int((one[n] | two[n]).sum()) for n in one)
    record_property(f"jaccard_{dtype_name}", both / either)
    print(f"Jaccard index of the sets of 1 and 2 ranks, {dtype_name}: {both / either:.4f}")
    assert both / either >= (0.99 if dtype_name == "fp32" else 0.8)


class Moody(nn.Module):
    """Dropout, batch norm, and draws from Python's and numpy's generators."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(15, 12), nn.BatchNorm1d(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        random.random()
        np.random.rand()
        return self.b(nn.functional.dropout(self.norm(self.a(x.flatten(1))), 0.3, self.training))


def train_after_scoring(engine: str, scoring: bool) -> Any:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model: Any = Moody()
    if engine == "fsdp2":
        model = torch.distributed.fsdp.fully_shard(model)
    elif engine == "ddp":
        model = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.0001)
    optimizer = make_optimizer("momentum", model.parameters())
    batches = [my_part(b) for b in make_batches(6, 8, torch.float32)]
    model.train()
    bare = model.module if engine == "ddp" else model
    bare.norm.eval()  # a module in its own mode
    for i, batch in enumerate(batches):
        loss_fn(model, batch).backward()
        if i == 0 and scoring:  # with gradients in place, in the middle of training
            for _ in range(2):
                score_importance(model, batches, loss_fn, head="b", accumulation=2, criterion="removal")
        optimizer.step()
        if i != 2:
            optimizer.zero_grad()
        bare.norm.train(i % 2 == 0)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    draws = torch.rand(3), random.random(), np.random.rand()
    return full_state(model), buffers, draws, [m.training for m in model.modules()]


@pytest.mark.parametrize(("engine", "ranks"), [("single", 1), ("ddp", 4), ("fsdp2", 2)])
def test_training_after_scoring_is_bit_equal(engine: str, ranks: int) -> None:
    plain = run_ranks(ranks, train_after_scoring, engine, False)
    scored = run_ranks(ranks, train_after_scoring, engine, True)
    for (state, buffers, draws, modes), (state1, buffers1, draws1, modes1) in zip(plain, scored, strict=True):
        assert all(torch.equal(state[n], state1[n]) for n in state)
        assert all(torch.equal(buffers[n], buffers1[n]) for n in buffers)
        assert torch.equal(draws[0], draws1[0]) and draws[1:] == draws1[1:] and modes == modes1


def train_static_graph(scoring: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(15, 8), nn.Tanh(), nn.Linear(8, 3))
    model = nn.parallel.DistributedDataParallel(net, static_graph=True)
    optimizer, batches = make_optimizer("sgd", model.parameters()), [my_part(b) for b in make_batches(4, 8, torch.float32)]
    if scoring:
        score_importance(model, batches, loss_fn, head="3")
    for batch in batches:
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    return full_state(model)


def test_scoring_leaves_a_static_graph_alone() -> None:
    """DDP counts the backwards that reach its hooks: one too many before training, and it never reduced again."""
    plain, scored = run_ranks(2, train_static_graph, False), run_ranks(2, train_static_graph, True)
    for states in zip(plain, scored, strict=True):
        assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
        assert all(torch.equal(plain[0][n], states[1][n]) for n in states[0])


class Counting(nn.Module):
    """A forward that puts a new tensor into its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(15, 3)
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.n = self.n + 1
        return self.linear(x.flatten(1))


def test_buffers_that_are_replaced_are_put_back() -> None:
    model = Counting()
    before = model.n
    score_importance(model, make_batches(3, 4, torch.float32), loss_fn, head=())
    assert model.n is before and float(model.n) == 0


def unusual_fsdp2() -> tuple[float, str]:
    """A reduction that was set to a sum, and a mesh of half the ranks."""
    batches = [my_part(b) for b in make_batches(NUM, SIZE, torch.float64)]
    plain = score_importance(wrap(make_net(torch.float64), "fsdp2"), batches, loss_fn, head=HEAD, criterion="removal")
    model: Any = wrap(make_net(torch.float64), "fsdp2")
    for module in model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    summed = score_importance(model, batches, loss_fn, head=HEAD, criterion="removal")
    worst = max(float((plain.shards[n].values - summed.shards[n].values).abs().sum()) for n in plain.shards)
    half = torch.distributed.fsdp.fully_shard(
        make_net(), mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))["a"]
    )
    with pytest.raises(EngineError) as error:
        score_importance(half, None, None, head=HEAD, criterion="random")
    return worst, str(error.value)


def test_unusual_fsdp2() -> None:
    for worst, message in run_ranks(4, unusual_fsdp2):
        assert worst < 1e-9
        assert "sharded over 2 of 4 ranks" in message


class Sized:
    """Batches with a length, such as those of a loader, and what comes after the last one."""

    ended = False

    def __len__(self) -> int:
        return NUM

    def __iter__(self) -> Iterator[Any]:
        yield from make_batches(NUM, SIZE, torch.float32)
        self.ended = True


def test_batches_come_to_their_end() -> None:
    """So that a progress bar in them is full, and processes that read for them end."""
    batches = Sized()
    score_importance(make_net(), batches, loss_fn, head=HEAD)
    assert batches.ended


def unequal_numbers_of_batches() -> str:
    batches = make_batches(3 - dist.get_rank(), 4, torch.float32)
    with pytest.raises(ScoreError) as error:
        score_importance(wrap(make_net(), "fsdp2"), batches, loss_fn, head=HEAD)
    return str(error.value)


def other_weights() -> str:
    with pytest.raises(ScoreError) as error:
        score_importance(make_net(seed=dist.get_rank()), None, None, head=HEAD, criterion="random")
    return str(error.value)


def test_replicas_must_be_equal() -> None:
    assert all("the ranks have different values in conv.weight" in m for m in run_ranks(2, other_weights))


def test_unequal_numbers_of_batches_are_an_error_on_every_rank() -> None:
    for message in run_ranks(2, unequal_numbers_of_batches):
        assert "the ranks have [3, 2] left" in message


def infinite_loss(model: nn.Module, batch: Any) -> Tensor:
    return loss_fn(model, batch) * float("inf")


def nan_gradient(model: nn.Module, batch: Any) -> Tensor:
    """A finite loss whose gradient is NaN in `mix` alone."""
    weight = model.get_parameter("mix.weight")
    return loss_fn(model, batch) + (weight - weight.detach()).sum().clamp_min(0).sqrt()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"head": "haed"}, PatternError, "head pattern 'haed' matches no parameter .did you mean 'head'"),
        ({"eligible": ["blocks.7.*"]}, PatternError, "eligible pattern"),
        ({"head": None}, PatternError, "head must be a name or pattern such as 'classifier'"),
        ({"eligible": ["head.weight"]}, ScoreError, "no eligible weights"),
        ({"eligible": ["frozen.weight"]}, ScoreError, "no eligible weights"),
        ({"criterion": "tailor"}, ScoreError, "did you mean 'taylor'"),
        ({"accumulation": 0}, ScoreError, "at least 1"),
        ({"accumulation": 2}, ScoreError, "a multiple of accumulation"),
        ({"batches": []}, ScoreError, "no batches"),
        ({"batches": None}, ScoreError, "needs batches"),
        ({"loss_fn": infinite_loss}, ScoreError, "the loss of a score batch is inf"),
        ({"loss_fn": lambda m, b: 1.0}, ScoreError, "scalar tensor"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "batches": make_batches(3, 4, torch.float32), "loss_fn": loss_fn, "head": HEAD, **change
    }  # fmt: skip
    batches, loss = arguments.pop("batches"), arguments.pop("loss_fn")
    with pytest.raises(error, match=message):
        score_importance(make_net(), batches, loss, **arguments)


def test_nan_scores_name_the_parameter() -> None:
    scores = score_importance(make_net(), make_batches(1, 4, torch.float32), nan_gradient, head=HEAD)
    with pytest.raises(ScoreError, match=r"NaN or infinite in mix.weight"):
        select_fundamental(scores)


def test_random_is_spread_evenly() -> None:
    """A counter hash, tested as a generator: mean, variance, no correlation of neighbours, other seeds other sets."""
    net = nn.Linear(500, 400)
    values = score_importance(net, None, None, head=(), criterion="random").shards["weight"].values.double()
    assert values.numel() == prod((500, 400)) and float(values.min()) >= 0 and float(values.max()) < 1
    assert abs(float(values.mean()) - 0.5) < 0.003 and abs(float(values.var()) - 1 / 12) < 0.001
    assert abs(float(torch.corrcoef(torch.stack([values[1:], values[:-1]]))[0, 1])) < 0.01
    chosen = select_fundamental(score_importance(net, None, None, head=(), criterion="random"), 0.1)
    other = select_fundamental(score_importance(net, None, None, head=(), criterion="random", seed=1), 0.1)
    assert abs(chosen.jaccard(other) - 0.1 / 1.9) < 0.01


def save_and_select(path: str, engine: str) -> Any:
    scores = score_importance(
        wrap(make_net(), engine), [my_part(b) for b in make_batches(NUM, SIZE, torch.float32)], loss_fn, head=HEAD
    )
    save_scores(scores, path)
    return masks(scores), scores.loss


def load_and_select(path: str, engine: str) -> Any:
    scores = load_scores(path, wrap(make_net(), engine))
    return masks(scores), scores.loss, scores.head, scores.unscored, scores.num_batches


@pytest.mark.parametrize("engine", ["fsdp2", "ddp"])
def test_scores_in_a_file(engine: str, tmp_path: Path) -> None:
    """Written on two ranks, read on one and three: the same set."""
    path = str(tmp_path / "scores.safetensors")
    expected, loss = run_ranks(2, save_and_select, path, engine)[0]
    for ranks, other in ((1, "single"), (3, "fsdp2"), (2, "ddp")):
        found, *about = run_ranks(ranks, load_and_select, path, other)[0]
        assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)
        assert about[0] == loss and about[1] == as_patterns(HEAD, what="head") and about[3] == NUM
    data = bytearray((tmp_path / "scores.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "altered.safetensors").write_bytes(data)
    (tmp_path / "short.safetensors").write_bytes(data[:-9])
    (tmp_path / "other.safetensors").write_bytes(b"no such file")
    for name, what in {"altered": "altered", "short": "altered", "other": "damaged", "missing": "damaged"}.items():
        with pytest.raises(ScoreError, match=what):
            load_scores(tmp_path / f"{name}.safetensors", make_net())
    with pytest.raises(ScoreError, match="which this model lacks or has in another shape"):
        load_scores(path, nn.Linear(3, 3))
