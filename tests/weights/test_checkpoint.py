"""A checkpoint is independent of engine and number of ranks: training goes on elsewhere as if nothing had happened."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from dcft_dist import FundamentalSet, attach_penalty, load_weights, save_weights
from dcft_dist.distributed import collectives
from dcft_dist.engines.find import torch_optimizer
from dcft_dist.errors import CheckpointError
from dcft_dist.files import read_json, write_json
from dcft_dist.weights import checkpoint
from dcft_dist.weights import model_state as contents
from dcft_dist.weights.checkpoint import read_state, save_checkpoint
from dcft_dist.weights.model_state import load_checkpoint, model_state

from ..nets import HEAD, full_state, loss_fn, make_batches, make_net, make_optimizer, my_part
from ..prepared import ZERO, prepare
from ..ranks import run_ranks

BATCH, STEPS = 12, 3
JOURNEYS = [
    [("fsdp2", 4), ("ddp", 2), ("fsdp1-full-flat", 1), ("zero2", 3)],
    [("zero3", 4), ("fsdp2-hybrid", 2), ("single", 1), ("fsdp1-gradop-orig", 3)],
    [("fsdp2-shard1", 2), ("zero1", 4), ("zero3-offload", 3), ("fsdp2", 1)],
    [("zero0", 2), ("zero2-offload", 4), ("fsdp1-none-flat", 2), ("zero3", 1)],
]


def leg(engine: str, number: int, folder: str, steps: int = STEPS) -> dict[str, Tensor]:
    """Some steps from the checkpoint of the leg before, and a checkpoint for the next one."""
    prepared = prepare(
        make_net, engine, lambda p: make_optimizer("adamw_smooth", p), micro_batch=BATCH // dist.get_world_size()
    )
    optimizer: Any = torch_optimizer(prepared.optimizer)
    if number:
        before = Path(folder) / f"leg_{number - 1}"
        assert read_state(before) == {"leg": number - 1}
        load_checkpoint(before, prepared.model, optimizer)
    chosen = FundamentalSet.from_masks({"blocks.0.up.weight": torch.ones(11, 13, dtype=torch.bool)}, head=HEAD)
    attach_penalty(prepared.model, chosen, 0.1, optimizer=prepared.optimizer)
    for batch in make_batches(STEPS * 4, BATCH, torch.float32)[STEPS * number :][:steps]:
        prepared.zero_grad(to_none=True)
        prepared.backward(loss_fn(prepared.model, my_part(batch)), True)
        prepared.step()
    save_checkpoint(Path(folder) / f"leg_{number}", model_state(prepared.model, optimizer), {"leg": number})
    return prepared.state()


@pytest.mark.parametrize("journey", JOURNEYS, ids=lambda j: "-".join(f"{e}@{n}" for e, n in j))
def test_training_goes_on_under_other_engines_and_ranks(journey: list[tuple[str, int]], tmp_path: Path) -> None:
    net = make_net()
    optimizer = make_optimizer("adamw_smooth", net.parameters())
    held = net.blocks[0].up.weight
    batches = make_batches(STEPS * 4, BATCH, torch.float32)
    for number, (engine, ranks) in enumerate(journey):
        for batch in batches[STEPS * number : STEPS * (number + 1)]:
            optimizer.zero_grad()
            loss_fn(net, batch).backward()
            old = held.detach().clone()
            optimizer.step()
            held.data.copy_(old + 0.1 * (held.data - old))
        for state in run_ranks(ranks, leg, engine, number, str(tmp_path)):
            for name, weight in net.named_parameters():
                if not name.startswith("unused"):  # an engine with flat buffers decays it
                    assert float((state[name].view_as(weight) - weight.detach()).abs().max()) <= 2e-6, (engine, name)


class Wide(nn.Module):
    """Many weights, a buffer, and more rows than ranks."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.blocks:
            x = x + layer(x)
        return self.norm(x)


def wide(engine: str, layers: int) -> Any:
    prepared = prepare(lambda: Wide(layers), engine, lambda p: torch.optim.AdamW(p, lr=1e-2), micro_batch=4)
    prepared.zero_grad(to_none=True)
    prepared.backward(prepared.model(torch.randn(4, 8)).square().mean(), True)
    prepared.step()
    return prepared


def sent(engine: str, folder: str) -> list[tuple[int, int]]:
    """(collectives, bytes) of a save and of a load, of a small and of a large model. torch's own ones would raise."""

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("an object was sent")

    for name in ("gather_object", "all_gather_object", "scatter_object_list", "broadcast_object_list"):
        setattr(dist, name, refused)
    found = []
    for layers in (2, 40):
        prepared, place = wide(engine, layers), Path(folder) / f"layers_{layers}"
        state = model_state(prepared.model, torch_optimizer(prepared.optimizer))
        with collectives.counted() as saved:
            save_checkpoint(place, state, {})
        with collectives.counted() as loaded:
            load_checkpoint(place, prepared.model, torch_optimizer(prepared.optimizer))
        found += [(saved.calls, saved.num_bytes), (loaded.calls, loaded.num_bytes)]
    return found


@pytest.mark.parametrize(("engine", "ranks"), [("fsdp2", 4), ("ddp", 2), ("zero2", 2)])
def test_what_is_sent_does_not_grow_with_the_model(engine: str, ranks: int, tmp_path: Path) -> None:
    """Nor with the product of ranks and tensors: a save sends five numbers a rank, and some codes of success."""
    for found in run_ranks(ranks, sent, engine, str(tmp_path)):
        assert found[:2] == found[2:], found
        assert found[0] == (7, (5 + 6) * 8 * ranks) and found[1][0] <= 2, found


def files_read(engine: str, folder: str, save: bool) -> list[int]:
    """Ranks of which this rank reads the files, and whether values and state come back."""
    prepared = wide(engine, 3)
    optimizer: Any = torch_optimizer(prepared.optimizer)
    if save:
        save_checkpoint(Path(folder) / "it", model_state(prepared.model, optimizer), {})
    read, found = contents.ShardReader, list[int]()

    class Noted(read):  # type: ignore[valid-type, misc]
        def read(self, requested: Any) -> None:
            files = {Path(str(info.relative_path)).name for info in self.metadata.storage_data.values()}
            found.extend(sorted(int(name.split("-")[1]) - 1 for name in files))
            super().read(requested)

    contents.ShardReader = Noted  # type: ignore[misc]
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p].clear()
    load_checkpoint(Path(folder) / "it", prepared.model, optimizer)
    state = model_state(prepared.model, optimizer)
    assert {name.rpartition(".")[2] for name in state if name.startswith("optimizer")} >= {"step", "exp_avg", "exp_avg_sq"}
    assert all(float(v) == 1 for name, v in state.items() if name.endswith(".step"))
    return found


def test_a_rank_reads_its_own_file_if_that_is_enough(tmp_path: Path) -> None:
    """And that of rank 0. With other ranks, with replicas, or from an older version: all files."""
    assert run_ranks(4, files_read, "fsdp2", str(tmp_path), True) == [[0], [0, 1], [0, 2], [0, 3]]
    assert run_ranks(2, files_read, "fsdp2", str(tmp_path), False) == [[0, 1, 2, 3]] * 2
    assert run_ranks(4, files_read, "fsdp2-hybrid", str(tmp_path), False) == [[0, 1, 2, 3]] * 4
    assert run_ranks(2, files_read, "ddp", str(tmp_path), False) == [[0, 1, 2, 3]] * 2
    manifest = tmp_path / "it" / "manifest.json"
    write_json(manifest, read_json(manifest) | {"format": 2})
    assert run_ranks(4, files_read, "fsdp2", str(tmp_path), False) == [[0, 1, 2, 3]] * 4


def test_a_weight_that_nobody_stores(tmp_path: Path) -> None:
    state = model_state(make_net())
    state["model.mix.weight"].values = state["model.mix.weight"].values[1:]
    with pytest.raises(CheckpointError, match=r"the ranks would store .* elements of .* weights: nothing was saved"):
        save_checkpoint(tmp_path / "step_00000001", state, {})
    assert not (tmp_path / "step_00000001").exists()


def part_frozen(first: bool) -> nn.Module:
    net = make_net()
    net.mix.weight.requires_grad_(not first)
    return net


def thawing(engine: str, folder: str) -> dict[str, Tensor]:
    """A first leg in which one more weight is frozen, and a second one in which it is trained."""
    for first in (True, False):
        prepared = prepare(
            lambda first=first: part_frozen(first),  # type: ignore[misc]
            engine,
            lambda p: make_optimizer("adamw_smooth", p),
            micro_batch=BATCH // dist.get_world_size(),
        )
        optimizer: Any = torch_optimizer(prepared.optimizer)
        if not first:
            load_checkpoint(Path(folder) / "frozen", prepared.model, optimizer)
        for batch in make_batches(2 * STEPS, BATCH, torch.float32)[0 if first else STEPS :][:STEPS]:
            prepared.zero_grad(to_none=True)
            prepared.backward(loss_fn(prepared.model, my_part(batch)), True)
            prepared.step()
        if first:
            save_checkpoint(Path(folder) / "frozen", model_state(prepared.model, optimizer), {})
    return prepared.state()


@pytest.mark.parametrize(("engine", "ranks"), [("ddp", 2), ("fsdp2", 2), ("fsdp1-full-orig", 2)])
def test_a_weight_that_is_unfrozen_at_a_resume_begins_anew(engine: str, ranks: int, tmp_path: Path) -> None:
    """Its moments and its count of steps begin at zero; those of the others go on."""
    net, batches = part_frozen(True), make_batches(2 * STEPS, BATCH, torch.float32)
    optimizer = make_optimizer("adamw_smooth", net.parameters())
    for step, batch in enumerate(batches):
        if step == STEPS:
            net.mix.weight.requires_grad_(True)
            optimizer.add_param_group({"params": [net.mix.weight]})
        optimizer.zero_grad()
        loss_fn(net, batch).backward()
        optimizer.step()
    for state in run_ranks(ranks, thawing, engine, str(tmp_path)):
        for name, weight in net.named_parameters():
            distance = float((state[name].view_as(weight) - weight.detach()).abs().max())
            assert distance <= 2e-6 or name.startswith("unused"), (engine, name)


def resumed(engine: str, folder: str) -> list[str]:
    """Names of the weights that differ in any bit between two legs and one of twice the length."""
    leg(engine, 0, folder)
    found, expected = leg(engine, 1, folder), leg(engine, 0, folder, 2 * STEPS)
    return [name for name, weight in expected.items() if not torch.equal(found[name], weight)]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "fsdp2-shard1", "fsdp1-full-flat", "fsdp1-full-orig", *ZERO[:4]])
def test_the_same_engine_goes_on_to_the_bit(engine: str, tmp_path: Path) -> None:
    assert run_ranks(2, resumed, engine, str(tmp_path)) == [[], []]


# -- DeepSpeed's own checkpoints -----------------------------------------------------------------------------------------


def universal_leg(engine: str, number: int, folder: str) -> dict[str, Tensor]:
    """Three steps under the fundamental set that lies beside DeepSpeed's own checkpoints."""
    prepared = prepare(
        make_net, engine, lambda p: make_optimizer("adamw_smooth", p), micro_batch=BATCH // dist.get_world_size(),
        zero_options={"checkpoint": {"load_universal": bool(number)}},
    )  # fmt: skip
    file = Path(folder) / "fundamental.safetensors"
    if number:
        prepared.model.load_checkpoint(folder, tag="universal")
    else:
        masks = {"blocks.0.up.weight": torch.ones(11, 13, dtype=torch.bool)}
        FundamentalSet.from_masks(masks, head=HEAD).save(file)
    attach_penalty(prepared.model, FundamentalSet.load(file), 0.1)
    for batch in make_batches(2 * STEPS, BATCH, torch.float32)[STEPS * number :][:STEPS]:
        prepared.backward(loss_fn(prepared.model, my_part(batch)), True)
        prepared.step()
    if not number:
        prepared.model.save_checkpoint(folder, tag="last")
    return prepared.state()


@pytest.mark.parametrize(("engine", "ranks", "then"), [("zero2", 4, 2), ("zero3", 2, 3), ("zero1", 2, 1)])
def test_the_set_travels_with_universal_checkpoints(engine: str, ranks: int, then: int, tmp_path: Path) -> None:
    net = make_net()
    optimizer, held = make_optimizer("adamw_smooth", net.parameters()), net.blocks[0].up.weight
    for batch in make_batches(2 * STEPS, BATCH, torch.float32):
        optimizer.zero_grad()
        loss_fn(net, batch).backward()
        old = held.detach().clone()
        optimizer.step()
        held.data.copy_(old + 0.1 * (held.data - old))
    run_ranks(ranks, universal_leg, engine, 0, str(tmp_path))
    convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    folders = ["--input_folder", str(tmp_path / "last"), "--output_folder", str(tmp_path / "universal")]
    subprocess.run([*convert, *folders], check=True, capture_output=True, env=os.environ | {"DS_ACCELERATOR": "cpu"})
    for state in run_ranks(then, universal_leg, engine, 1, str(tmp_path)):
        for name, weight in net.named_parameters():
            if not name.startswith("unused"):
                assert float((state[name].view_as(weight) - weight.detach()).abs().max()) <= 2e-6, name


# -- plain weights ------------------------------------------------------------------------------------------------------


def export(engine: str, folder: str, limit: int) -> dict[str, Tensor]:
    prepared = prepare(make_net, engine, lambda p: make_optimizer("sgd", p), micro_batch=BATCH // dist.get_world_size())
    for batch in make_batches(2, BATCH, torch.float32):
        prepared.zero_grad(to_none=True)
        prepared.backward(loss_fn(prepared.model, my_part(batch)), True)
        prepared.step()
    save_weights(prepared.model, folder, max_file_bytes=limit)
    return prepared.state()


def import_(engine: str, folder: str) -> tuple[dict[str, Tensor], Tensor]:
    def make() -> Any:
        return make_net(seed=1)

    prepared = prepare(make, engine, lambda p: make_optimizer("sgd", p), micro_batch=BATCH // dist.get_world_size())
    load_weights(prepared.model, folder)
    with torch.no_grad():
        prepared.model.eval()
        loss = loss_fn(prepared.model, make_batches(1, BATCH, torch.float32)[0])
    return prepared.state(), loss


@pytest.mark.parametrize(
    ("engine", "ranks", "then", "limit"),
    [
        ("fsdp2", 4, ("zero3", 2), 10**9),
        ("zero2", 3, ("fsdp1-full-flat", 2), 500),
        ("fsdp1-hybrid-orig", 4, ("ddp", 2), 10**9),
        ("fsdp2-shard1", 2, ("zero1", 2), 500),
        ("zero3", 2, ("fsdp2-shard1", 2), 10**9),
        ("ddp", 2, ("zero0", 3), 10**9),
        ("single", 1, ("fsdp2-hybrid", 4), 10**9),
    ],
)
def test_plain_weights_go_out_and_in(engine: str, ranks: int, then: tuple[str, int], limit: int, tmp_path: Path) -> None:
    """What is written loads strictly into a plain module by plain means, and into another engine on other ranks."""
    trained = run_ranks(ranks, export, engine, str(tmp_path), limit)[0]
    assert (tmp_path / "model.safetensors.index.json").exists() == (limit == 500)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 1 if limit > 500 else len(files) > 3
    plain = make_net(seed=2)
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    plain.load_state_dict(stored, strict=True)
    assert all(torch.equal(p.detach().view(-1), trained[n].view(-1)) for n, p in plain.named_parameters())
    loss = loss_fn(plain.eval(), make_batches(1, BATCH, torch.float32)[0])
    for state, found in run_ranks(then[1], import_, then[0], str(tmp_path)):
        assert all(torch.equal(state[n].view(-1), trained[n].view(-1)) for n in trained), then
        assert float(found) == pytest.approx(float(loss.detach()), abs=1e-6)


def test_plain_weights_with_a_prefix_a_type_and_mistakes(tmp_path: Path) -> None:
    net = make_net()
    save_weights(net, tmp_path, prefix="blocks.0.", dtype=torch.bfloat16, max_file_bytes=100)
    save_weights(net, tmp_path, prefix="blocks.0.", dtype=torch.bfloat16)  # one file: the earlier ones are taken away
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored["up.weight"], net.blocks[0].up.weight.detach().bfloat16())
    block = make_net(seed=1).blocks[0]
    load_weights(block, tmp_path)
    assert torch.equal(block.up.weight.detach(), stored["up.weight"].float())
    before = full_state(other := make_net(seed=2))
    load_weights(other, tmp_path, prefix="blocks.0.")  # of the rest nothing is asked, and it stays
    after = full_state(other)
    assert torch.equal(after["blocks.0.up.weight"], stored["up.weight"].float())
    assert all(torch.equal(after[n], before[n]) for n in before if not n.startswith("blocks.0."))
    with pytest.raises(CheckpointError, match=r"missing: conv.weight.*; not in the model: down.weight"):
        load_weights(net, tmp_path)
    with pytest.raises(CheckpointError, match=r"not in the model: down.weight, norm.bias"):
        load_weights(nn.Sequential(net.blocks[0].norm), tmp_path)
    with pytest.raises(CheckpointError, match=r"down.weight is \(13, 11\) in the file and \(13, 4\) in the model"):
        load_weights(make_net().blocks[1], tmp_path)
    with pytest.raises(CheckpointError, match=r"no weight's name begins with 'body\."):
        save_weights(net, tmp_path, prefix="body.")
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(CheckpointError, match="was altered after it was written"):
        load_weights(block, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(data[:-9])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_weights(block, tmp_path)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_weights(block, tmp_path / "nothing")


def late(folder: str, forever: bool) -> str:
    """Rank 1's file becomes visible to rank 0 a second later, or never."""
    prepared, place = wide("fsdp2", 3), Path(folder) / ("never" if forever else "late")
    has_size, began = checkpoint._has_size, time.monotonic()
    checkpoint._has_size = lambda file, size: (  # type: ignore[assignment]
        has_size(file, size) and ("shard-00002" not in file.name or (time.monotonic() - began > 1 and not forever))
    )
    checkpoint.VISIBLE_S = 3.0
    try:
        save_checkpoint(place, model_state(prepared.model), {})
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "saved" if checkpoint.is_complete(place) else "incomplete"


def test_a_file_system_that_shows_files_late(tmp_path: Path) -> None:
    assert run_ranks(2, late, str(tmp_path), False) == ["saved", "saved"]
    first, second = run_ranks(2, late, str(tmp_path), True)
    assert first.startswith("CheckpointError: ") and "is not whole on rank 0 after 3 s: runs_dir must be on" in first
    assert "rank 0: " in second and "not whole" in second and not (tmp_path / "never").exists()


class Scaled(nn.Module):
    """A weight without dimensions, as temperatures are, and a buffer."""

    def __init__(self, rows: int = 6, size: int = 8) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.layer = nn.Linear(8, rows)
        self.register_buffer("mean", torch.arange(float(size)))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.layer(x)


def test_a_weight_without_dimensions(tmp_path: Path) -> None:
    """Its negative moment comes back; and so does the count of steps, into an optimizer that has made more."""

    def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        net(torch.ones(2, 8)).square().sum().neg().backward()
        optimizer.step()

    torch.manual_seed(0)
    net = Scaled()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(2):
        step(net, optimizer)
    assert float(optimizer.state[net.scale]["exp_avg"]) < 0
    save_checkpoint(tmp_path / "it", model_state(net, optimizer), {})
    saved = {n: v.clone() for n, v in optimizer.state[net.scale].items()}
    for _ in range(3):
        step(net, optimizer)
    load_checkpoint(tmp_path / "it", net, optimizer)
    assert {n: float(v) for n, v in optimizer.state[net.scale].items()} == {n: float(v) for n, v in saved.items()}
    assert float(optimizer.state[net.layer.weight]["step"]) == 2


@pytest.mark.parametrize(
    ("rows", "size", "said"), [(4, 8, "layer.weight, layer.bias has another size"), (6, 12, "buffer.mean is")]
)
def test_a_checkpoint_of_a_model_of_another_size(tmp_path: Path, rows: int, size: int, said: str) -> None:
    save_checkpoint(tmp_path / "it", model_state(Scaled()), {})
    net = Scaled(rows, size)
    before = {n: p.clone() for n, p in net.state_dict().items()}
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(tmp_path / "it", net)
    assert all(torch.equal(p, before[n]) for n, p in net.state_dict().items())
