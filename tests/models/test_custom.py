"""The user's model: built, loaded, sharded and exported; mistakes are named."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dcft_dist.config.schema import Config
from dcft_dist.config.toml import load_config, to_toml
from dcft_dist.data.splits import Split
from dcft_dist.engines.prepared import WrapOptions
from dcft_dist.engines.wrap import prepare
from dcft_dist.errors import CheckpointError, ConfigError
from dcft_dist.models.build import build_model
from dcft_dist.packages import minilm_folder
from dcft_dist.planning.inspection import groups_of, lines_of
from dcft_dist.weights.export import save_weights
from dcft_dist.weights.loading import Allowed, Loading

from ..nets import OddNet, make_net
from ..own import tiny_decoder
from ..ranks import run_ranks
from ..weights.test_loading import CPU, built_on_meta, loaded, saved

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
    with pytest.raises(
        CheckpointError, match=r"decode.weight would be newly initialised, but is tied to pre-trained weights"
    ):
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
        (["--model.build", "nowhere.at.all"], "no module nowhere"),
        (["--model.build", "transformers.AutoModle"], "transformers has no AutoModle"),
        (["--model.build", "numpy.ndim"], "numpy.ndim fails: TypeError"),
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
    with pytest.raises(ConfigError, match="import_roots: /nowhere is not a folder"):
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
