"""The user's model: built by import path, its weights read under every engine, and what can be wrong with them."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dcft_dist.compat.pytorch import persistent_buffers
from dcft_dist.config.schema import Config
from dcft_dist.config.toml import load_config, to_toml
from dcft_dist.data.splits import Split
from dcft_dist.distributed import collectives
from dcft_dist.engines.find import find_engine
from dcft_dist.engines.meta import on_meta
from dcft_dist.engines.prepared import WrapOptions
from dcft_dist.engines.whole_tensors import average_buffers, fill_weights, whole_weight
from dcft_dist.engines.wrap import prepare, shards_weights
from dcft_dist.errors import CheckpointError, ConfigError
from dcft_dist.models.build import build_model
from dcft_dist.models.pretrained import find_blocks
from dcft_dist.packages import minilm_folder
from dcft_dist.planning.inspection import groups_of, lines_of
from dcft_dist.weights.export import save_weights
from dcft_dist.weights.loading import Allowed, Loading
from dcft_dist.weights.weight_files import WeightFiles

from .nets import OddNet, make_net
from .own import tiny_decoder
from .ranks import run_ranks

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
    for place in (tmp_path / "plain.pth", tmp_path / "inside.pt", tmp_path / "old.pth", hub):
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
    torch.save({"model": Boom()}, tmp_path / "evil.pth")
    assert "cannot be read without running code in it" in refused(tmp_path / "evil.pth")
    file = saved(tmp_path, make_net())
    file.write_bytes(file.read_bytes()[:-40])
    assert "cannot be read" in refused(file)
    assert refused(tmp_path / "nothing").endswith(
        "nothing is not there: give the file or folder of weights that you have downloaded"
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
    with pytest.raises(CheckpointError, match="would go where another tensor of the file goes"):
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
    assert "extra has no place in the model" in refused(file)
    _, report = loaded(file, allowed=Allowed(head=("head",), unused=["ext*"]))
    assert set(report.unused) == {"extra", "head.weight", "head.bias"} and report.fresh == ["head.weight", "head.bias"]
    net.mix = nn.Linear(13, 6)
    file = saved(tmp_path / "wrong", net)
    assert "mix.weight is [6, 13] there and [7, 13] in the model" in refused(file)
    state = {n: v for n, v in load_file(saved(tmp_path / "less", make_net())).items() if not n.startswith("mix")}
    save_file(state, tmp_path / "less/model.safetensors")
    assert "no mix.weight, no mix.bias" in refused(tmp_path / "less")
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
    with pytest.raises(CheckpointError, match="no square grids"):
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
    with pytest.raises(CheckpointError, match=r"these are no square grids"):  # 1,024 places in a text, not 32 by 32
        Loading(Net(4098, 27), tmp_path, allowed=Allowed(resize=["clip.pos"]))
    save_file({**state, "odd": torch.zeros(7, 6)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"clip.pos is \[17, 6\] there and \[66, 6\] in the model(?!: model.resize)"):
        Loading(Net(66, 27), tmp_path, allowed=Allowed(unused=["odd"]))


# -- from a configuration ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of the real MiniLM, as a folder of transformers with its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    folder = tmp_path_factory.mktemp("minilm")
    model = AutoModel.from_pretrained(minilm_folder(), num_hidden_layers=2, add_pooling_layer=False, local_files_only=True)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm_folder(), local_files_only=True).save_pretrained(folder)
    return folder


def values_here(config: Config) -> bool:
    """Whether the user's way of reading gives the weights that transformers reads."""
    from transformers import AutoModel

    found = build_model(config, 5)
    assert found.loading is not None
    found.loading.into_whole(found.module, CPU)
    options = {"add_pooling_layer": False} if "mean" in str(config.model.features) else {}
    wanted = AutoModel.from_pretrained(config.model.weights, dtype=torch.float32, **options).state_dict()
    mine = {n.removeprefix("backbone."): p for n, p in found.module.state_dict().items() if n.startswith("backbone.")}
    return mine.keys() == wanted.keys() and all(torch.equal(mine[n], wanted[n]) for n in wanted)


def test_values_are_those_that_transformers_reads(minilm: Path, tmp_path: Path) -> None:
    """A DINOv2 in bfloat16 under the names of its publication, too; the export says that it is float32."""
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).to(torch.bfloat16).save_pretrained(tmp_path / "dino")
    assert any("attention.attention.query" in name for name in load_file(tmp_path / "dino/model.safetensors"))
    dino = load_config("mri.toml", ["--model.build", "transformers.AutoModel", "--model.weights", str(tmp_path / "dino"),
                                    "--model.features", "cls"])  # fmt: skip
    for config in (own(minilm, "--model.args.add_pooling_layer", "false"), dino):
        assert run_ranks(1, values_here, config) == [True]
    build_model(dino, 5).describe(tmp_path / "export")
    assert json.loads((tmp_path / "export/config.json").read_text())["dtype"] == "float32"


def test_a_tied_head_is_no_head(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"decode.weight would start afresh, but is tied to pre-trained weights"):
        Loading(built_on_meta(OddNet), saved(tmp_path, make_net()), allowed=Allowed(head=("head", "decode")))


def test_arguments_beside_the_weights_are_read_over(tmp_path: Path) -> None:
    state = {n: v for n, v in make_net().state_dict().items() if n != "decode.weight"}
    torch.save({"model": state, "args": argparse.Namespace(lr=1.0)}, tmp_path / "mae.pth")
    assert len(loaded(tmp_path / "mae.pth")[1].matched) == len(state) - 2


def own(folder: Path, *more: str) -> Config:
    words = ["--model.build", "transformers.AutoModel", "--model.weights", str(folder), "--model.features", "mean"]
    return load_config("smoke.toml", ["--model.name", "own", *words, "--model.unused", '["pooler.*"]', *more])


def test_own_model_is_the_packaged_one(minilm: Path, tmp_path: Path) -> None:
    config = own(minilm, "--model.new", '["pooler"]')
    (tmp_path / "again.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "again.toml") == config
    mine, packaged = build_model(config, 5), build_model(load_config("smoke.toml", ["--model.num_layers", "2"]), 5)
    assert all(p.is_meta for p in mine.module.parameters()) and mine.parts == packaged.parts
    assert [type(b) for b in mine.blocks] == [type(b) for b in packaged.blocks] and len(mine.blocks) == 2
    assert mine.loading is not None
    assert [n for n in mine.loading.report.fresh if not n.startswith("head.")] == [
        "backbone.pooler.dense.weight", "backbone.pooler.dense.bias",
    ]  # fmt: skip
    groups = groups_of(mine, None)
    assert {n for n, g in groups.items() if g == "head"} == {"head.weight", "head.bias"}
    line = next(line for line in lines_of(mine, None) if "intermediate.dense.weight" in line.name)
    assert (line.name, line.shape, line.group, line.number) == (
        "backbone.encoder.layer.[0,1].intermediate.dense.weight", (1536, 384), "eligible", 2,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.build", "nowhere.at.all"], "there is no module nowhere"),
        (["--model.build", "transformers.AutoModle"], "transformers has no AutoModle"),
        (["--model.build", "json.dumps"], "json.dumps fails: TypeError"),
        (["--model.head", '["hed"]', "--model.new", '["pooler"]'], "head pattern 'hed' matches no parameter"),
        (["--model.blocks", '["layers.*"]', "--model.new", '["pooler"]'], "model.blocks: 'layers.\\*' matches no module"),
        (["--model.weights", "/nowhere"], "no tokenizer in /nowhere"),
        (["--model.unused", "[]", "--model.new", "[]"], "no pooler.dense.weight"),
    ],
)
def test_bad_models(minilm: Path, words: list[str], message: str) -> None:
    config = own(minilm, *words)
    if "--model.head" in words:
        config = config.model_copy(update={"model": config.model.model_copy(update={"features": None})})
    with pytest.raises(Exception, match=message) as error:
        build_model(config, 5).head_names  # noqa: B018
    assert type(error.value).__name__ in ("ConfigError", "CheckpointError", "PatternError")


def test_a_decoder_that_knows_no_padding_classifies(tmp_path: Path) -> None:
    """GPT-2's and Llama's tokenizers have no padding token: the end of the text fills up, and the model is told."""
    from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

    weights, _ = tiny_decoder(tmp_path / "decoder"), torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(weights)
    tokenizer.pad_token = None
    sizes = {
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "vocab_size": max(tokenizer.get_vocab().values()) + 1,
        "n_positions": 32,
    }
    GPT2ForSequenceClassification(GPT2Config(**sizes, pad_token_id=None)).save_pretrained(tmp_path / "gpt")
    tokenizer.save_pretrained(tmp_path / "gpt")
    words = ["--model.build", "transformers.AutoModelForSequenceClassification", "--model.weights", str(tmp_path / "gpt")]
    words += ["--task.name", "own", "--data.path", "x", "--data.modality", "text", "--model.head", '["score"]']
    config = load_config("icd.toml", [*words, "--task.max_tokens", "32", "--model.args.num_labels", "num_outputs"])
    found = build_model(config, 3)
    assert found.loading is not None
    found.loading.into_whole(found.module, torch.device("cpu"))
    texts = ["a short one", "a text that is quite a bit longer than the first", "one"]
    batch = found.processor(Split(texts, [0, 1, 2], list("abc"))).inputs([0, 1, 2])
    with torch.no_grad():
        together = found.outputs(found.module.eval(), batch)
        alone = [found.outputs(found.module, found.processor(Split([t], [0], ["a"])).inputs([0])) for t in texts]
    torch.testing.assert_close(together, torch.cat(alone))
    with pytest.raises(ConfigError, match=r"task.max_tokens = 48, but the model has 32 positions"):
        build_model(load_config("icd.toml", [*words, "--task.max_tokens", "48"]), 3)


def test_keys_of_own_models() -> None:
    with pytest.raises(ConfigError, match="model: name = 'own' needs build"):
        load_config("icd.toml", ["--model.name", "own"])
    with pytest.raises(ConfigError, match="model: features, head: only for a model of `build`"):
        load_config("icd.toml", ["--model.features", "mean", "--model.head", '["x"]'])
    assert load_config("icd.toml", ["--model.build", "json.loads"]).model.name == "own"


def test_code_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "def make(width, outputs):\n"
        "    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, outputs))\n"
    )
    words = ["--import_roots", json.dumps([str(tmp_path)]), "--model.build", "my_nets:make", "--model.head", '["2"]']
    config = load_config("mri.toml", [*words, "--model.args.width", "5", "--model.args.outputs", "num_outputs"])
    found = build_model(config, 4)
    assert [tuple(p.shape) for p in found.module.parameters()] == [(5, 3), (5,), (4, 5), (4,)]
    assert found.head_names == ["2.weight", "2.bias"] and found.loading is None
    before = copy.deepcopy(found.module.state_dict())
    assert all(torch.equal(v, before[n]) for n, v in build_model(config, 4).module.state_dict().items())  # from the seed
    with pytest.raises(ConfigError, match="import_roots: /nowhere is no folder"):
        build_model(load_config("mri.toml", ["--model.build", "x.y", "--import_roots", '["/nowhere"]']), 4)


def test_arguments_that_are_no_values(tmp_path: Path) -> None:
    """Classes and functions by import path, as some models of timm take them (UNI2: mlp_layer, act_layer)."""
    words = [
        "--task.name",
        "own",
        "--data.path",
        "x",
        "--model.build",
        "torch.nn.TransformerEncoderLayer",
        "--model.head",
        "[]",
    ]
    words += [
        "--model.args.d_model",
        "8",
        "--model.args.nhead",
        "2",
        "--model.args.activation",
        "object:torch.nn.functional.silu",
    ]
    built = build_model(load_config("mri.toml", words), 3).module
    assert built.activation is torch.nn.functional.silu
    with pytest.raises(ConfigError, match=r"model.args: torch.nn.functional has no silo .did you mean 'silu'"):
        build_model(load_config("mri.toml", [*words[:-1], "object:torch.nn.functional.silo"]), 3)


def test_an_export_of_a_part_has_the_names_of_its_class(tmp_path: Path) -> None:
    """Where two would fit, those of the part that it is: an encoder is not read as a decoder."""
    from transformers import BartConfig, BartModel

    sizes = {
        "d_model": 8,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    BartModel(BartConfig(vocab_size=40, max_position_embeddings=16, **sizes)).save_pretrained(tmp_path)
    words = ["--task.name", "own", "--data.path", "x", "--model.build", "transformers.AutoModel", "--model.features", "mean"]
    words += ["--model.weights", str(tmp_path), "--model.part", "encoder", "--model.unused", '["*"]', "--model.new", '["*"]']
    found = build_model(load_config("mri.toml", words), 3).parts
    assert {prefix: (part.folder, part.stem) for prefix, part in found.items()} == {
        "backbone.": (".", "encoder."),
        "head.": ("head", ""),
    }


def read_cut(folder: str, target: str) -> None:
    words = ["--task.name", "own", "--data.path", "x", "--model.build", "transformers.AutoModel", "--model.features", "cls"]
    found = build_model(load_config("mri.toml", [*words, "--model.weights", folder, "--model.image_size", "28"]), 3)
    prepared = prepare(
        found.module, WrapOptions("fsdp2", CPU, found.blocks), lambda w: torch.optim.SGD([p for _, p, _ in w])
    )
    found.loading.into(prepared.model)  # type: ignore[union-attr]
    save_weights(prepared.model, target, prefix="backbone.")


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_tensors_that_a_library_cuts(ranks: int, tmp_path: Path) -> None:
    """DINOv2 giant as it was published: gate and input of an MLP in one tensor, of which each rank reads its own rows."""
    from transformers import AutoModel, Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**sizes, use_swiglu_ffn=True)).save_pretrained(tmp_path / "giant")
    assert any("weights_in" in name for name in load_file(tmp_path / "giant/model.safetensors"))
    run_ranks(ranks, read_cut, str(tmp_path / "giant"), str(tmp_path / "read"))
    theirs, mine = AutoModel.from_pretrained(tmp_path / "giant").state_dict(), load_file(tmp_path / "read/model.safetensors")
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], value) for name, value in theirs.items())


@pytest.mark.parametrize(("name", "body"), [("SwinUNETR", "swinViT"), ("UNETR", "vit"), ("SegResNet", "down_layers")])
def test_the_decoders_of_monai_are_heads(name: str, body: str) -> None:
    """All that the pre-training of an encoder leaves random, and nothing of the encoder."""
    args = {"SwinUNETR": {"feature_size": 12}, "UNETR": {"img_size": "[32, 32, 32]", "feature_size": 4}}.get(name, {})
    args |= {"in_channels": 1, "out_channels": "num_outputs"}
    words = ["--task.name", "own", "--task.kind", "segmentation", "--data.path", "x", "--data.modality", "volume"]
    words += ["--data.classes", '["none", "a", "b"]', "--model.build", f"monai.networks.nets.{name}"]
    words += [word for key, value in args.items() for word in (f"--model.args.{key}", str(value))]
    found = build_model(load_config("mri.toml", words), 3)
    rest = {n.split(".")[0] for n, _ in found.module.named_parameters()} - {n.split(".")[0] for n in found.head_names}
    assert rest == {body} | ({"convInit"} if name == "SegResNet" else set())
