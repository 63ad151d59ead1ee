"""`dcft plan`: what is foretold without memory is what real ranks then need."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, ResNetConfig, T5Config, ViTConfig

from benchmarks import plan
from dcft_dist.cli import main
from dcft_dist.compat.deepspeed import zero3_alone, zero3_weights
from dcft_dist.compat.pytorch import fake_ranks, fake_tensors, look_at_memory, memory_tracker
from dcft_dist.errors import ConfigError, EngineError
from dcft_dist.method import kernels, shard_table
from dcft_dist.method.bits import num_bytes
from dcft_dist.method.step_checks import StepChecks
from dcft_dist.planning.fit import fitting, fitting_table
from dcft_dist.planning.memory import Forecast, _prepared, forecast, measure, table
from dcft_dist.planning.planned_models import Request, planned, request_of

from ..ranks import run_ranks

SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("configs")
    configs: dict[str, Any] = {
        "vit": ViTConfig(**SIZES, image_size=64, patch_size=16),
        "decoder": LlamaConfig(**SIZES, vocab_size=1000, tie_word_embeddings=True),
        "short": LlamaConfig(**SIZES | {"num_hidden_layers": 2}, vocab_size=1000, tie_word_embeddings=True),
        "t5": T5Config(),
        "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
    }
    for name, config in configs.items():
        config.save_pretrained(folder / name)
    return {name: str(folder / name) for name in configs}


PEAKS = ("plain_peak", "dcft_peak", "score_peak")


def really(request: Request) -> Forecast:
    """On real ranks with what a GPU would do: the kernels themselves need no memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_table, "_DENSE", -1.0)
        patch.setattr(StepChecks, "_is_due", lambda *_: False)  # samples of 4,096 cells are not small beside these weights
        patch.setattr(shard_table, "usable", bool)
        for kernel in ("save_many", "shorten_many", "scale_many"):
            patch.setattr(kernels, kernel, lambda *_: None)
        return measure(request, nullcontext)


def least_peaks(request: Request, foretold: Forecast) -> tuple[Forecast, dict[str, int]]:
    """What real ranks need, at best of three: gloo holds on to a buffer for a moment longer, as it happens."""
    found = [run_ranks(request.ranks, really, request)[0]]
    while len(found) < 3 and any(getattr(found[-1], key) > 1.05 * getattr(foretold, key) for key in PEAKS):
        found.append(run_ranks(request.ranks, really, request)[0])
    return found[0], {key: min(getattr(f, key) for f in found) for key in PEAKS}


CASES = [(2, "vit", "update"), (4, "vit", "before"), (2, "decoder", "after"), (4, "decoder", "update")]


@pytest.mark.parametrize(("ranks", "model", "how"), CASES)
def test_equals_what_real_ranks_need(folders: dict[str, str], ranks: int, model: str, how: str) -> None:
    request = Request(folders[model], ranks, micro_batch=2, length=32, bf16=model == "vit")
    if how != "update":
        request = replace(request, level="gradient", where=how)  # type: ignore[arg-type]
    foretold = forecast(request)
    real, peaks = least_peaks(request, foretold)
    for key in ("weights", "eligible", "scores", "bits"):
        assert getattr(foretold, key) == getattr(real, key), key
    for key, peak in peaks.items():
        assert getattr(foretold, key) == pytest.approx(peak, rel=0.05), key
    for key in ("sent_plain", "sent_dcft", "sent_score"):
        for name in ("allgather_base", "reduce_scatter_base"):
            assert getattr(foretold, key)[name] == getattr(real, key)[name], (key, name)
    assert real.sent_dcft == real.sent_plain, "the penalty sends nothing in a step after the first"
    assert foretold.scores == pytest.approx(4 * foretold.eligible / ranks, rel=0.02)
    # What does not come from the code that both ran: Adam's two moments; scoring has scores in their place.
    moments = foretold.plain_step["optimizer"]
    assert moments == pytest.approx(8 * foretold.weights / ranks, rel=0.02)
    assert foretold.score_peak == pytest.approx(foretold.plain_peak - moments + foretold.scores, rel=0.02)
    marked = foretold.weights if how == "before" else foretold.eligible / ranks  # a buffer also holds other weights
    assert foretold.bits == pytest.approx(marked / 8, rel=0.02)


@pytest.mark.parametrize(("ranks", "engine"), [(4, "fsdp2"), (2, "zero3")])
def test_what_a_pull_keeps(folders: dict[str, str], ranks: int, engine: str) -> None:
    """A copy of the body in float32 and a byte for each eligible weight, both sharded; the same as on real ranks."""
    request = Request(folders["vit"], ranks, engine, pull_to_start=100.0, pull_by_importance=0.5)  # type: ignore[arg-type]
    foretold = forecast(request)
    assert foretold.pull == run_ranks(ranks, really, request)[0].pull
    assert foretold.pull == pytest.approx((4 * foretold.weights + foretold.eligible) / ranks, rel=0.02)
    assert foretold.dcft_peak == sum(foretold.dcft_step.values()) + foretold.bits + foretold.pull
    assert "pull to the start" in table(foretold)
    if engine == "fsdp2":
        offloaded = forecast(replace(request, offload=True, pull_by_importance=0.0))
        assert offloaded.host["pull to the start"] == pytest.approx(4 * foretold.weights / ranks, rel=0.02)


SAVING = [
    (2, "vit", {"activation_checkpointing": "blocks"}),
    (4, "decoder", {"activation_checkpointing": "selective"}),
    (2, "decoder", {"accumulation": 2, "reduce": "last"}),
    (4, "vit", {"accumulation": 2, "reduce": "each", "activation_checkpointing": "blocks"}),
    (4, "decoder", {"tensor_parallel": 2, "activations_on_host": True}),
    (2, "decoder", {"activations_on_host": True}),
    (4, "vit", {"offload": True, "activations_on_host": True, "activation_checkpointing": "blocks"}),
]


@pytest.mark.parametrize(("ranks", "model", "how"), SAVING)
def test_what_saves_memory_equals_what_real_ranks_need(
    folders: dict[str, str], ranks: int, model: str, how: dict[str, Any]
) -> None:
    plain = Request(folders[model], ranks, micro_batch=8, length=64, bf16=False)
    request = replace(plain, **how)
    foretold = forecast(request)
    real, peaks = least_peaks(request, foretold)
    for key, peak in peaks.items():
        assert getattr(foretold, key) == pytest.approx(peak, rel=0.05), key
    for key in ("sent_plain", "sent_dcft"):
        assert getattr(foretold, key) == getattr(real, key), key
    if request.activation_checkpointing != "none":
        assert foretold.plain_peak < 0.8 * forecast(plain).plain_peak
    assert foretold.host.keys() == real.host.keys()
    for kind, size in real.host.items():
        assert foretold.host[kind] == pytest.approx(size, rel=0.05), kind
    blocks = 3 * 8 * (17 if model == "vit" else 64) * 64 * 4  # inputs of the blocks: samples x tokens x width
    if request.activations_on_host and request.activation_checkpointing == "blocks":
        assert foretold.host["activations"] == blocks
    if request.offload:
        assert foretold.host["parameters"] == pytest.approx(4 * foretold.weights / ranks, rel=0.02)
        assert foretold.host["optimizer"] >= 8 * foretold.weights / ranks
        assert foretold.plain_step["optimizer"] == 0 and foretold.host["mask"] == foretold.bits > 0


def test_what_the_host_keeps(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """It decides too whether a model fits, and a checkpoint beside the training takes one more copy of everything."""
    words = ["--ranks", "4", "--gpus-per-node", "2", "--length", "32", "--offload", "--host-memory-gib", "0.0001"]
    assert main(["plan", "--model", folders["vit"], *words]) == 0
    text = capsys.readouterr().out
    assert (
        "does not fit into 0.0001 GiB" in text and "fits into 80 GiB" in text and "weights and optimizer on the host" in text
    )
    offloaded = Request(folders["vit"], 4, length=32, offload=True, gpus_per_node=2)
    assert (
        forecast(replace(offloaded, host_memory_gib=1.0)).fits
        and not forecast(replace(offloaded, host_memory_gib=1e-4)).fits
    )
    copied = forecast(Request(folders["vit"], 4, length=32, checkpoint_copies=True))
    assert copied.host == {"copy of a checkpoint": pytest.approx(12 * copied.weights / 4, rel=0.02)}


def test_where_gradients_wait(folders: dict[str, str]) -> None:
    """Unreduced gradients of the whole model, or one more reduction for each micro-batch; `auto` looks at the GPU."""
    three = Request(folders["short"], 4, length=32, bf16=False, accumulation=3)
    last, each = (forecast(replace(three, reduce=how)) for how in ("last", "each"))
    whole, share = 4 * last.weights, last.weights
    assert last.plain_peak - each.plain_peak == pytest.approx(whole - share, rel=0.2)
    reduced = "reduce_scatter_base"
    assert each.sent_plain[reduced] == 3 * last.sent_plain[reduced] > 0
    assert each.sent_plain["allgather_base"] == last.sent_plain["allgather_base"]
    small = forecast(replace(three, memory_gib=3 * whole / 2**30))
    assert small.plain_peak == each.plain_peak and forecast(three).plain_peak == last.plain_peak


@pytest.mark.parametrize(("ranks", "model", "how"), [(2, "vit", "update"), (4, "decoder", "before")])
def test_zero3_equals_what_real_ranks_need(folders: dict[str, str], ranks: int, model: str, how: str) -> None:
    request = Request(folders[model], ranks, "zero3", micro_batch=2, length=32, bf16=model == "vit")
    if how != "update":
        request = replace(request, level="gradient", where=how)  # type: ignore[arg-type]
    foretold = forecast(request)
    real, peaks = least_peaks(request, foretold)
    for key in ("weights", "eligible", "scores", "bits"):
        assert getattr(foretold, key) == getattr(real, key), key
    # DeepSpeed's `reduce_bucket_size`, beside which so small a model is nothing; and gloo copies what it scatters
    bucket, copied = 4 * 500_000_000, 4 * foretold.weights
    for key, peak in peaks.items():
        assert -0.05 * (peak - bucket) < peak - getattr(foretold, key) < 1.05 * copied, (key, peak, foretold)
    assert foretold.plain_step["optimizer"] == pytest.approx(8 * foretold.weights / ranks, rel=0.02)
    masters = 6 if request.bf16 else 8
    assert foretold.plain_step["parameters"] == pytest.approx(masters * foretold.weights / ranks, rel=0.02)
    for name in ("allgather_base", "reduce_scatter_base"):
        assert foretold.sent_dcft.get(name) == real.sent_dcft.get(name), (name, foretold, real)


def test_what_zero3_holds_before_a_step_counts(folders: dict[str, str]) -> None:
    """Partitions, masters and the bucket, though no operation touches some of them within the block."""
    request, mode = Request(folders["decoder"], 2, "zero3", bf16=True, length=32), fake_tensors(numbers=True)
    with fake_ranks(2), zero3_alone():
        prepared = _prepared(planned(request), request, mode)
        tracker, seen = memory_tracker(prepared.model, prepared.optimizer)
        with mode, tracker:
            look_at_memory(tracker)
        weights = sum(t.numel() * t.element_size() for t in zero3_weights(prepared.model))
    assert sum(seen.values()) > 4 * 500_000_000 + weights > 2e9 + 6e5


def test_a_large_model_on_many_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "vit_large", "--ranks", "1024", "--replicas", "8", "--memory-gib", "0.1"]) == 0
    text = capsys.readouterr().out
    assert "303,303,682 weights" in text and "on 1024 ranks (128 nodes), 8 replicas" in text
    assert "does not fit into 0.1 GiB" in text
    rows = {line.split("  ")[0].strip(): line.split()[-2:] for line in text.splitlines() if line.count("  ")}
    assert float(rows["mask"][1]) == pytest.approx(302776320 / 8 / 128 / 2**30, abs=6e-4)


def test_a_model_of_convolutions(folders: dict[str, str]) -> None:
    found = forecast(Request(folders["resnet"], 4, micro_batch=2))
    assert found.weights > found.eligible > 0 and found.dcft_peak > 0


def true_width(recipe: str, folder: Path) -> list[str]:
    """Words for a recipe whose model has its real width and four layers: all are alike, and each takes a second.

    docs/results/plan.md has whole models.
    """
    import transformers

    if recipe == "swin_unetr":
        return ["--model.args.depths", "[1,1,1,1]"]
    _, kind, sizes = plan.RECIPES[recipe]
    if recipe == "encoder_sam":
        config = transformers.SamConfig(vision_config={"num_hidden_layers": 4, "global_attn_indexes": [1, 3]})
    else:
        config = getattr(transformers, kind)(**{**sizes, "num_hidden_layers": 4})
    config.save_pretrained(folder)
    return ["--model.weights", str(folder)]


RECIPES = {
    "pathology_vit_giant": 0.116,
    "encoder_sam": 0.033,
    "reports_bert": 0.052,
    "swin_unetr": 0.06,
    "instructions_7b": 1.07,
    "instructions_70b": 5.52,
    "instructions_70b_lora": 5.54,
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_at_true_width(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From nothing but the configurations: sizes of a micro-batch, precision and level are theirs."""
    words = [
        *true_width(recipe, tmp_path),
        "--train.global_batch",
        "128",
        "--train.micro_batch",
        "2",
        "--ranks",
        "64",
        "--json",
    ]
    assert main(["plan", "--model", f"configs/{recipe}.toml", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["weights"] == pytest.approx(RECIPES[recipe] * 1e9, rel=0.02)
    assert found["request"]["micro_batch"] == 2 and found["request"]["level"] == "update"
    assert found["bits"] == pytest.approx(num_bytes(found["eligible"]) / 64, rel=0.02)
    assert found["fits"] and found["dcft_peak"] > found["bits"] >= 0
    if recipe.endswith("lora"):  # nothing is scored, and only the adapters have optimizer state
        assert found["eligible"] == found["score_peak"] == 0 and found["dcft_step"] == found["plain_step"]
        assert 0 < found["plain_step"]["optimizer"] < found["plain_step"]["parameters"] / 20
    else:
        assert found["bits"] > 0


def test_a_decoder_under_zero3_at_true_width(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*true_width("instructions_7b", tmp_path), "--engine", "zero3", "--ranks", "2", "--json"]
    assert main(["plan", "--model", "configs/instructions_7b.toml", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["weights"] == pytest.approx(1.07e9, rel=0.01) and found["request"]["engine"] == "zero3"
    assert found["plain_step"]["parameters"] == pytest.approx(6 * found["weights"] / 2, rel=0.01)
    assert found["bits"] == pytest.approx(num_bytes(found["eligible"]) / 2, rel=0.02)


def test_a_plan_follows_its_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SGD without momentum has no state and takes the gradient level; bits that are shared out are."""
    model = true_width("reports_bert", tmp_path)

    def found(*words: str) -> dict[str, Any]:
        assert main(["plan", "--model", "configs/reports_bert.toml", *model, "--ranks", "4", "--json", *words]) == 0
        told: dict[str, Any] = json.loads(capsys.readouterr().out)
        return told

    adam, sgd = found(), found("--optimizer.name", "sgd")
    assert adam["request"]["level"] == "update" and sgd["request"]["level"] == "gradient"
    assert adam["plain_step"]["optimizer"] > 1000 * sgd["plain_step"]["optimizer"]
    shared = found("--optimizer.name", "sgd", "--penalty.mask_placement", "sharded")
    assert shared["bits"] == pytest.approx(sgd["bits"] / 4, rel=0.01)
    words = ["--model.args.depths", "[1,1,1,1]", "--sharding.offload", "true", "--checkpoint.background", "true"]
    offloaded = request_of("configs/swin_unetr.toml", [*words, "--train.activations_on_host", "true"], ranks=2)
    assert offloaded.offload and offloaded.activations_on_host and offloaded.checkpoint_copies
    staged = request_of("configs/swin_unetr.toml", [*words, "--checkpoint.staging", "/tmp"], ranks=2)
    assert staged.offload and not staged.activations_on_host and not staged.checkpoint_copies


@pytest.mark.parametrize(("build", "engine"), [("torch.optim.Adagrad", "fsdp2"), ("torch.optim.NAdam", "zero3")])
def test_a_plan_with_another_optimizer(build: str, engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is tried on tensors without values, and a step may read its own count."""
    words = [*true_width("reports_bert", tmp_path), "--optimizer.build", build, "--ranks", "2", "--engine", engine, "--json"]
    assert main(["plan", "--model", "configs/reports_bert.toml", *words]) == 0
    told = capsys.readouterr().out  # DeepSpeed may speak first
    found = json.loads(told[told.index("{") :])
    states = 1 if build.endswith("Adagrad") else 2
    assert found["plain_step"]["optimizer"] == pytest.approx(4 * states * found["weights"] / 2, rel=0.02)


def test_adapters_are_planned_under_fsdp2_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*true_width("reports_bert", tmp_path), "--method", "lora", "--engine", "zero3"]
    assert main(["plan", "--model", "configs/reports_bert.toml", *words]) == 2
    assert "adapters can be planned under FSDP2, not under ZeRO-3" in capsys.readouterr().err


def planned_by_rule(request: Request) -> Forecast:
    """1 GiB, or 0.3 with offloading, and for each sample of a micro-batch 1 GiB, with checkpointing less."""
    share = {"none": 1.0, "selective": 0.5, "blocks": 0.1}[request.activation_checkpointing]
    share, whole = share / (2 if request.activations_on_host else 1), 0.3 if request.offload else 1.0
    return Forecast(request, dcft_step={"all": int(2**30 * (whole + share * request.micro_batch))})


@pytest.mark.parametrize(
    ("memory", "accumulation", "expected"),
    [
        (5.0, 1, [("none", 4, 1), ("selective", 8, 1), ("blocks", 32, 1)]),
        (5.0, 4, [("none", 4, 2), ("selective", 8, 1)]),  # eight samples in a step
        (1.7, 1, [("selective", 1, 1), ("blocks", 4, 1)]),
        (1.06, 1, [("blocks, activations", 1, 1), ("blocks, weights", 4, 1), ("blocks, activations, weights", 8, 1)]),
        (1.0, 1, [("blocks, weights", 4, 1), ("blocks, activations, weights", 8, 1)]),
        (0.3, 1, [("blocks, activations, weights", 1, 1)]),
        (100.0, 1, [("none", 64, 1)]),
    ],
)
def test_what_fits(memory: float, accumulation: int, expected: list[tuple[str, int, int]]) -> None:
    request = Request("any", 2, memory_gib=memory, accumulation=accumulation, micro_batch=2)
    found = fitting(request, planned_by_rule)
    ways = [
        r.activation_checkpointing + ", activations" * r.activations_on_host + ", weights" * r.offload
        for r in (f.request for f in found)
    ]
    assert [(way, f.request.micro_batch, f.request.accumulation) for way, f in zip(ways, found, strict=True)] == expected
    text, (how, *host) = fitting_table(found), expected[0][0].split(", ")
    fits = memory > 0.3
    assert ("nothing fits" in text) != fits
    assert (f"--train.micro_batch {expected[0][1]} --train.activation_checkpointing {how}" in text) == fits
    assert ("--sharding.offload true" in text) == (fits and "weights" in host)
    assert ("--train.activations_on_host true" in text) == (fits and "activations" in host)


def test_what_fits_a_configuration(tmp_path: Path) -> None:
    """Only micro-batches that the run would make: they divide what a rank has of a step."""
    words = ["--train.global_batch", "24", "--train.micro_batch", "8"]
    request = request_of("configs/instructions_7b.toml", words, ranks=2, memory_gib=7.5)
    assert (request.micro_batch, request.accumulation) == (6, 2)
    found = fitting(request, planned_by_rule)
    sizes = [(f.request.micro_batch, f.request.accumulation) for f in found]
    assert sizes == [(6, 2), (12, 1)] and found[0].fits, sizes
    alone = request_of("configs/instructions_7b.toml", [*words, "--sharding.tensor_parallel", "2"], ranks=2, micro_batch=5)
    assert (alone.micro_batch, alone.accumulation) == (4, 6)


def test_what_fits_by_the_command(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--ranks", "2", "--length", "256", "--memory-gib", "0.05", "--fit"]
    assert main(["plan", "--model", folders["short"], *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(f["fits"] and f["peak"] <= 0.05 * 2**30 for f in found) and found[0]["request"]["micro_batch"] >= 1
    larger = {**found[-1]["request"], "micro_batch": 2 * found[-1]["request"]["micro_batch"]}
    assert not forecast(Request(**{**larger, "words": ()})).fits


def test_refusals(folders: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'vit_larg' .did you mean 'vit_large'"):
        forecast(Request("vit_larg", 2))
    with pytest.raises(ConfigError, match="neither a causal language model nor an image classifier"):
        forecast(Request(folders["t5"], 2))
    with pytest.raises(ConfigError, match=r"only a model from model\.build can be planned, not minilm"):
        forecast(request_of("icd.toml", [], ranks=2))
    with pytest.raises(ConfigError, match=r"unknown words --model\.weights x"):
        request_of("vit_large", ["--model.weights", "x"], ranks=2)
    with pytest.raises(ConfigError, match="ranks must be at least 1, not 0"):
        forecast(Request(folders["vit"], 0))
    with pytest.raises(ConfigError, match=r"sharding\.offload can be planned under FSDP2, not under ZeRO-3"):
        forecast(Request(folders["vit"], 4, "zero3", offload=True))
    with pytest.raises(ConfigError, match=r"replicas are for FSDP2, not for ZeRO-3"):
        forecast(Request(folders["vit"], 4, "zero3", replicas=2))
    with pytest.raises(EngineError, match="3 replicas do not divide 4 ranks"):
        forecast(Request(folders["vit"], 4, replicas=3))
