"""The user's model: built by import path, its weights read under every engine, and what can be wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dcft_dist.compat.pytorch import persistent_buffers
from dcft_dist.config.toml import load_config
from dcft_dist.distributed import collectives
from dcft_dist.engines.find import find_engine
from dcft_dist.engines.meta import on_meta
from dcft_dist.engines.prepared import WrapOptions
from dcft_dist.engines.whole_tensors import average_buffers, fill_weights, whole_weight
from dcft_dist.engines.wrap import prepare, shards_weights
from dcft_dist.errors import CheckpointError, ConfigError
from dcft_dist.models.build import build_model
from dcft_dist.models.pretrained import find_blocks
from dcft_dist.weights.loading import Allowed, Loading
from dcft_dist.weights.weight_files import WeightFiles

from ..nets import OddNet, make_net
from ..ranks import run_ranks

CPU = torch.device("cpu")


ODD_HEAD = Allowed(head=("head",))


def built_on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with on_meta():
        return make()


def saved(folder: Path, net: nn.Module, **more: torch.Tensor) -> Path:
    """Its state, each weight once, as a safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {n: v.contiguous() for n, v in net.state_dict().items() if n != "decode.weight"}
    save_file({**state, **more}, folder / "model.safetensors")
    return folder / "model.safetensors"


# -- under every engine --------------------------------------------------------------------------------------------------


def load_here(kind: str, file: str, replicas: int = 1) -> tuple[dict[str, torch.Tensor], list[bool]]:
    """Whole weights after loading, and whether each weight was without memory when the model was wrapped."""
    name, _, stage = kind.partition("-")
    net = built_on_meta(OddNet)
    meta = [p.is_meta for p in net.parameters()]
    loading = Loading(net, Path(file), allowed=ODD_HEAD, seed=3)
    plan = WrapOptions(name, CPU, find_blocks(net), zero_stage=int(stage or 0), replicas=replicas)
    if not shards_weights(plan):
        loading.into_whole(net, CPU)
    model = prepare(net, plan, lambda weights: torch.optim.SGD([p for _, p, _ in weights], lr=0.1)).model
    if shards_weights(plan):
        loading.into(model)
    engine = find_engine(model)
    shapes = engine.full_shapes()
    return {s.name: whole_weight(s, s.local).view(shapes[s.name]).clone() for s in engine.shards()}, meta


KINDS = [(kind, 2, 1) for kind in ("ddp", "fsdp2", "fsdp1", "deepspeed-1", "deepspeed-3")]


HYBRID = [("fsdp2", 4, 2), ("fsdp1", 4, 2)]  # two groups of ranks that each hold all shards


@pytest.mark.parametrize(("kind", "ranks", "replicas"), [*KINDS, *HYBRID, ("fsdp2", 4, 1), ("deepspeed-3", 4, 1)])
def test_weights_are_read_under_every_engine(kind: str, ranks: int, replicas: int, tmp_path: Path) -> None:
    net = make_net(seed=7)
    net.steps += 5
    file = saved(tmp_path, net)
    alone, _ = run_ranks(1, load_here, "single", str(file))[0]
    for found, meta in run_ranks(ranks, load_here, kind, str(file), replicas):
        assert all(meta) and found.keys() == alone.keys()
        for name, value in found.items():
            wanted = alone[name] if name.startswith("head") else net.get_parameter(name)
            assert torch.equal(value, wanted), name
    assert not torch.equal(alone["head.weight"], net.head.weight)
    assert 0.1 < float(alone["head.weight"].std() * 13**0.5) < 1.5  # as nn.Linear draws them


def precision_here() -> tuple[set[str], str]:
    """Data types of the weights that DeepSpeed gathers, and of the output for an input in float32."""
    net = built_on_meta(lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    plan = WrapOptions("deepspeed", CPU, list(net.children()), bf16=True, zero_stage=3)
    model = prepare(net, plan, lambda weights: torch.optim.SGD([p for _, p, _ in weights], lr=0.1)).model
    return {str(p.ds_tensor.dtype) for p in model.module.parameters()}, str(model(torch.randn(2, 6)).dtype)


def test_a_model_without_memory_is_in_bfloat16_under_zero_3() -> None:
    assert run_ranks(2, precision_here) == [({"torch.bfloat16"}, "torch.bfloat16")] * 2


def buffers_here(file: str) -> float:
    net = built_on_meta(OddNet)
    Loading(net, Path(file), allowed=ODD_HEAD).into_whole(net, CPU)
    return float(net.steps)


def test_buffers_are_read_and_a_tied_weight_is_one(tmp_path: Path) -> None:
    net = make_net()
    net.steps += 5
    assert run_ranks(1, buffers_here, str(saved(tmp_path, net))) == [5.0]
    tied = built_on_meta(OddNet)
    Loading(tied, tmp_path / "model.safetensors", allowed=ODD_HEAD)  # has no decode.weight
    assert tied.decode.weight is tied.encode.weight


def fill_here() -> list[float]:
    net = make_net()
    plan = WrapOptions("fsdp2", CPU, find_blocks(net))
    model = prepare(net, plan, lambda weights: torch.optim.SGD([p for _, p, _ in weights], lr=0.1)).model
    fill_weights(model, {"mix.weight": torch.arange(91.0).view(7, 13)})
    shard = {s.name: s for s in find_engine(model).shards()}["mix.weight"]
    return whole_weight(shard, shard.local).tolist()  # type: ignore[no-any-return]


def test_whole_weights_go_into_shards() -> None:
    assert run_ranks(3, fill_here) == [list(range(91))] * 3


def buffers_over_ranks(kind: str) -> float:
    net = make_net()
    model = prepare(
        net, WrapOptions(kind, CPU, find_blocks(net)), lambda w: torch.optim.SGD([p for _, p, _ in w], lr=0.1)
    ).model
    buffers = persistent_buffers(find_engine(model).module)
    buffers["steps"].fill_(3.0 + collectives.rank())
    average_buffers(model)
    return float(buffers["steps"])


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp1", "deepspeed"])
def test_statistics_of_each_rank_become_those_of_all(kind: str) -> None:
    """Batch normalisation would give each rank, and each export, another model."""
    assert run_ranks(2, buffers_over_ranks, kind) == [3.5, 3.5]


# -- files ---------------------------------------------------------------------------------------------------------------


def loaded(place: Path, **options: Any) -> tuple[nn.Module, Any]:
    """In this process, without ranks."""
    net = built_on_meta(OddNet)
    loading = Loading(net, place, allowed=options.pop("allowed", ODD_HEAD), **options)
    return net, loading.report


def refused(place: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        loaded(place, **options)
    return str(error.value)


def test_every_kind_of_file(tmp_path: Path) -> None:
    net = make_net(seed=7)
    state = {n: v.contiguous() for n, v in net.state_dict().items() if n != "decode.weight"}
    torch.save(state, tmp_path / "plain.pth")
    torch.save({"epoch": 3, "model": state}, tmp_path / "inside.pt")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    hub = tmp_path / "hub"
    hub.mkdir()
    first = dict(list(state.items())[:4])
    save_file(first, hub / "a.safetensors")
    save_file({n: v for n, v in state.items() if n not in first}, hub / "b.safetensors")
    where = {n: "a.safetensors" if n in first else "b.safetensors" for n in state}
    (hub / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    nnunet = {"network_weights": state, "optimizer_state": {"state": {}}, "grad_scaler_state": None, "current_epoch": 9}
    nnunet |= {"logging": {"mean_fg_dice": [np.float64(0.3), np.float32(0.2)]}, "_best_ema": np.float64(0.4)}
    nnunet |= {"init_args": {"plans": {"spacing": np.array([1.0, 2.0])}, "fold": np.int64(0), "device": torch.device("cpu")}}
    torch.save(nnunet, tmp_path / "checkpoint_final.pth")  # the keys and types of nnU-Net 2
    files = [tmp_path / name for name in ("plain.pth", "inside.pt", "old.pth", "checkpoint_final.pth")]
    for place in (*files, hub):
        with WeightFiles(place) as stored:
            assert set(stored) == set(state)
            assert torch.equal(stored["mix.weight"][2:5], net.mix.weight[2:5]) and stored.shape("conv.weight") == (7, 3, 3)
    (hub / "b.safetensors").unlink()
    assert "b.safetensors of its index are missing" in refused(hub)


class Boom:
    """An object whose unpickling would run code."""

    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('code was run')",))


def test_damaged_files_and_code_in_files(tmp_path: Path) -> None:
    for evil in ({"model": Boom()}, {"network_weights": {}, "init_args": np.array([Boom()], dtype=object)}):
        torch.save(evil, tmp_path / "evil.pth")
        assert "cannot be read without running code in it" in refused(tmp_path / "evil.pth")
    file = saved(tmp_path, make_net())
    file.write_bytes(file.read_bytes()[:-40])
    assert "cannot be read" in refused(file)
    assert refused(tmp_path / "nothing").endswith(
        "nothing does not exist: give the file or folder of weights that you have downloaded"
    )
    gated = refused(Path("google/medgemma-4b-it"))
    assert "hf download google/medgemma-4b-it --local-dir weights/medgemma-4b-it (a gated model asks for your login" in gated
    words = [
        "--model.build",
        "transformers.AutoModel",
        "--model.weights",
        "google/medgemma-4b-it",
        "--model.features",
        "cls",
    ]
    with pytest.raises(ConfigError, match="hf download google/medgemma-4b-it"):
        build_model(load_config("mri.toml", words), 2)
    (tmp_path / "empty").mkdir()
    assert "holds no weights" in refused(tmp_path / "empty")
    torch.save([1, 2], tmp_path / "list.pth")
    assert "holds a list, not named tensors" in refused(tmp_path / "list.pth")


def test_a_part_of_what_a_file_holds(tmp_path: Path) -> None:
    """Names outside the part that are the part's own once it is left out are other weights."""
    net, other = make_net(), make_net(seed=1)
    both = {**{f"visual.{n}": v for n, v in net.state_dict().items()}, **other.state_dict()}
    both.pop("visual.decode.weight"), both.pop("decode.weight")
    torch.save(both, tmp_path / "clip.pth")  # in this order: the others come last
    loading = Loading(built_on_meta(OddNet), tmp_path / "clip.pth", allowed=ODD_HEAD, part="visual")
    assert loading.report.unused == ["visual.head.weight", "visual.head.bias"]
    assert run_ranks(1, part_here, str(tmp_path / "clip.pth")) == [float(net.mix.weight.detach().double().sum())]
    with pytest.raises(CheckpointError, match="would get the name of another tensor"):
        Loading(built_on_meta(OddNet), tmp_path / "clip.pth", allowed=ODD_HEAD, rename={"visual.": ""})
    alone = saved(tmp_path / "alone", net)  # as an export of the part has it
    assert "mix.weight" in Loading(built_on_meta(OddNet), alone, allowed=ODD_HEAD, part="visual").report.matched


def part_here(file: str) -> float:
    net = built_on_meta(OddNet)
    Loading(net, Path(file), allowed=ODD_HEAD, part="visual").into_whole(net, CPU)
    return float(net.mix.weight.detach().double().sum())


def test_what_differs_is_named(tmp_path: Path) -> None:
    net = make_net()
    file = saved(tmp_path, net, extra=torch.zeros(2))
    assert 'extra has no place in the model; in [model], unused = ["extra"] leaves it out' in refused(file)
    _, report = loaded(file, allowed=Allowed(head=("head",), unused=["ext*"]))
    assert set(report.unused) == {"extra", "head.weight", "head.bias"} and report.fresh == ["head.weight", "head.bias"]
    net.mix = nn.Linear(13, 6)
    file = saved(tmp_path / "wrong", net)
    assert "mix.weight is [6, 13] in the file and [7, 13] in the model" in refused(file)
    state = {n: v for n, v in load_file(saved(tmp_path / "less", make_net())).items() if not n.startswith("mix")}
    save_file(state, tmp_path / "less/model.safetensors")
    assert 'no mix.weight, no mix.bias; in [model], new = ["mix.*"] draws it from the seed' in refused(tmp_path / "less")
    _, report = loaded(tmp_path / "less", allowed=Allowed(head=("head",), new=["mix"]))
    assert report.fresh == ["mix.weight", "mix.bias", "head.weight", "head.bias"]


def test_prefixes(tmp_path: Path) -> None:
    state = {f"module.{n}": v for n, v in make_net().state_dict().items() if n != "decode.weight"}
    save_file(state, tmp_path / "model.safetensors")
    assert 'model.rename = {"module." = ""} would make most names fit' in refused(tmp_path)
    _, report = loaded(tmp_path, rename={"module.": ""})
    assert len(report.matched) == len(state) - 2


class Vit(nn.Module):
    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, 4))
        self.head = nn.Linear(4, 2)


def resized_here(file: str, tokens: int) -> torch.Tensor:
    net = Vit(tokens)
    Loading(net, Path(file), allowed=Allowed(head=("head",), resize=["pos_embed"])).into_whole(net, CPU)
    return net.pos_embed.detach()


def test_position_embeddings_are_resized(tmp_path: Path) -> None:
    """A plane stays a plane away from the border, extra tokens stay as they are."""
    old = Vit(1 + 14 * 14)
    rows, columns = torch.meshgrid(torch.arange(14.0), torch.arange(14.0), indexing="ij")
    with torch.no_grad():
        old.pos_embed[0, 0] = 99
        old.pos_embed[0, 1:, 0], old.pos_embed[0, 1:, 1] = rows.flatten(), columns.flatten()
    save_file(old.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.resize = \['pos_embed'\] interpolates it"):
        Loading(Vit(1 + 28 * 28), tmp_path, allowed=ODD_HEAD)
    found = run_ranks(1, resized_here, str(tmp_path), 1 + 28 * 28)[0]
    assert torch.equal(found[0, 0], torch.full((4,), 99.0))
    grid = found[0, 1:].view(28, 28, 4)[4:-4, 4:-4]
    torch.testing.assert_close(grid[:, 0, 0], (torch.arange(4.0, 24.0) + 0.5) / 2 - 0.5, atol=1e-4, rtol=0)
    torch.testing.assert_close(grid[0, :, 1], (torch.arange(4.0, 24.0) + 0.5) / 2 - 0.5, atol=1e-4, rtol=0)
    with pytest.raises(CheckpointError, match="not square grids"):
        Loading(Vit(200), tmp_path, allowed=Allowed(head=("head",), resize=["pos_embed"]))


def test_position_embeddings_of_other_forms(tmp_path: Path) -> None:
    """Of CLIP, without a batch dimension; of SAM, by distance: as its own code stretches them."""
    from transformers.models.sam.modeling_sam import SamVisionAttention

    torch.manual_seed(0)
    state = {"clip.pos": torch.randn(1 + 4 * 4, 6), "sam.rel_pos_h": torch.randn(27, 6)}
    save_file({**state, "odd": torch.zeros(7, 6)}, tmp_path / "model.safetensors")

    class Net(nn.Module):
        def __init__(self, tokens: int, distances: int) -> None:
            super().__init__()
            self.clip, self.sam = nn.Module(), nn.Module()
            self.clip.pos, self.sam.rel_pos_h = (nn.Parameter(torch.zeros(n, 6)) for n in (tokens, distances))

    net, allowed = Net(1 + 8 * 8, 55), Allowed(unused=["odd"], resize=["clip.pos", "*rel_pos*"])
    Loading(net, tmp_path, allowed=allowed).into_whole(net, CPU)
    assert torch.equal(net.clip.pos[0], state["clip.pos"][0])
    image = torch.nn.functional.interpolate(
        state["clip.pos"][1:].T.reshape(1, 6, 4, 4), (8, 8), mode="bicubic", antialias=True, align_corners=False
    )
    torch.testing.assert_close(net.clip.pos[1:], image[0].flatten(1).T)
    wanted = SamVisionAttention.get_rel_pos(None, 28, 28, state["sam.rel_pos_h"])  # [28, 28, 6] of differences
    torch.testing.assert_close(net.sam.rel_pos_h[27:], wanted[:, 0])
    save_file({"sam.rel_pos_h": torch.zeros(27, 6), "clip.pos": torch.zeros(1026, 6)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"these are not square grids"):  # 1,024 places in a text, not 32 by 32
        Loading(Net(4098, 27), tmp_path, allowed=Allowed(resize=["clip.pos"]))
    save_file({**state, "odd": torch.zeros(7, 6)}, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"clip.pos is \[17, 6\] in the file and \[66, 6\] in the model(?!: model.resize)"
    ):
        Loading(Net(66, 27), tmp_path, allowed=Allowed(unused=["odd"]))
