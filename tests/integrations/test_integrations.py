"""The callbacks for transformers and Lightning, and Accelerate: other people's loops, the same weights as one plain loop."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from dcft_dist import FundamentalSet, attach_penalty, score_importance, select_fundamental
from dcft_dist.compat.deepspeed import import_deepspeed
from dcft_dist.compat.transformers import trainer_folder
from dcft_dist.errors import EngineError

from ..nets import HEAD, loss_fn, make_batches, make_net, make_optimizer, my_part
from ..prepared import Prepared
from ..ranks import run_ranks

ROOT = Path(__file__).parents[2]

STEPS, SIZE = 6, 4  # micro-batches of SIZE samples on each of two ranks
ZERO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def make_bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20, "num_labels": 3}
    return BertForSequenceClassification(
        BertConfig(vocab_size=30, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
    )


def samples() -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 30, (STEPS * 2 * SIZE, 7), generator=g)
    return [{"input_ids": t, "labels": t.sum() % 3} for t in tokens]


def whole_batch(step: int) -> dict[str, Tensor]:
    rows = samples()[step * 2 * SIZE : (step + 1) * 2 * SIZE]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def bert_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


def reference(steps: int = STEPS) -> tuple[FundamentalSet, dict[str, Tensor]]:
    """Scored on two batches, then trained, by one process; the update of the selected weights is shortened by hand."""
    model = make_bert()
    scores = score_importance(model, [whole_batch(0), whole_batch(1)], bert_loss, head="classifier")
    chosen = select_fundamental(scores, 0.2)
    masks = {n: chosen.mask(n) for n in chosen.names}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        bert_loss(model, whole_batch(step)).backward()
        old = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.step()
        for n, p in model.named_parameters():
            if n in masks:
                p.data.copy_(torch.where(masks[n], old[n] + 0.1 * (p.data - old[n]), p.data))
    return chosen, {n: p.detach().clone() for n, p in model.named_parameters()}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(float((found[n] - w).abs().max()) for n, w in expected.items())


# -- transformers -------------------------------------------------------------------------------------------------------


def make_trainer(kind: str, folder: str, steps: int, factor: float = 0.1, **options: Any) -> tuple[Any, Any]:
    import_deepspeed()
    from transformers import Trainer, TrainingArguments

    from dcft_dist.integrations.transformers import DCFTCallback

    zero = (
        {**ZERO, "zero_optimization": {"stage": int(kind[-1]), "stage3_gather_16bit_weights_on_model_save": True}}
        if kind.startswith("zero")
        else None
    )
    args = TrainingArguments(
        folder, per_device_train_batch_size=SIZE, max_steps=steps, lr_scheduler_type="constant", max_grad_norm=0.0,
        use_cpu=True, train_sampling_strategy="sequential", save_steps=3, report_to=[], disable_tqdm=True, deepspeed=zero,
        logging_strategy="no", optim="sgd", learning_rate=0.1,
        average_tokens_across_devices=False,  # or it doubles the loss of models that return a mean whatever they are told
    )  # fmt: skip
    model = make_bert()
    trainer = Trainer(model, args, train_dataset=samples())
    callback = DCFTCallback(trainer, head="classifier", fraction=0.2, factor=factor, num_batches=2, **options)
    trainer.add_callback(callback)
    return trainer, callback


def weights_of(trainer: Any) -> dict[str, Tensor]:
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {n: w.detach().clone() for n, w in state.items()} if state else {}


def hf_run(kind: str, folder: str, steps: int, resume: bool, level: str) -> tuple[int, dict[str, Tensor]]:
    trainer, callback = make_trainer(kind, folder, steps, penalty={"level": level})
    if resume:  # whatever is scored now would be another set
        callback.recipe = replace(callback.recipe, fraction=0.5, num_batches=1)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-3" if resume else None)
    assert dist.get_world_size() == trainer.accelerator.num_processes
    assert callback.penalty is None  # taken off at the end
    return callback.fundamental.num_selected, weights_of(trainer)


@pytest.mark.parametrize(("kind", "level"), [("ddp", "update"), ("zero2", "update"), ("zero3", "gradient")])
def test_transformers_trainer(kind: str, level: str, tmp_path: Path) -> None:
    """Same set and weights as a plain loop, also when it goes on from a checkpoint (with its set, not a new one)."""
    chosen, expected = reference()
    results = run_ranks(2, hf_run, kind, str(tmp_path), STEPS, False, level)
    for folder in (tmp_path, tmp_path / "checkpoint-3", tmp_path / "checkpoint-6"):
        assert FundamentalSet.load(folder / "fundamental.safetensors").jaccard(chosen) == 1.0
    (tmp_path / "fundamental.safetensors").unlink()
    results += run_ranks(2, hf_run, kind, str(tmp_path), STEPS, True, level)
    assert len([state for _, state in results if state]) >= 2
    for selected, state in results:
        assert selected == chosen.num_selected
        assert not state or worst(state, expected) <= 1e-6


def hf_plain(folder: str, dcft: bool) -> dict[str, Tensor]:
    """Random sampling and dropout: scoring must not shift them. Factor 1 changes nothing but the scoring."""
    trainer, callback = make_trainer("ddp", folder, STEPS, factor=1.0)
    trainer.args.train_sampling_strategy = "random"
    for module in trainer.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    if not dcft:
        trainer.remove_callback(callback)
    trainer.train()
    return weights_of(trainer)


def test_scoring_in_the_trainer_leaves_the_training_alone(tmp_path: Path) -> None:
    plain, scored = (run_ranks(2, hf_plain, str(tmp_path / str(dcft)), dcft)[0] for dcft in (False, True))
    assert all(torch.equal(plain[n], scored[n]) for n in plain)
    assert worst(plain, reference()[1]) > 1e-3  # the order of the samples was another one


def hf_errors(folder: str) -> list[str]:
    found = []
    trainer, _ = make_trainer("ddp", folder, 3)
    trainer.train()
    for file in Path(folder).rglob("fundamental.safetensors"):
        file.unlink(missing_ok=True)
    elsewhere = make_trainer("ddp", f"{folder}/other", 6)  # has a set, but it is not that of the checkpoint
    masks = {"bert.pooler.dense.weight": torch.ones_like(elsewhere[0].model.bert.pooler.dense.weight, dtype=torch.bool)}
    FundamentalSet.from_masks(masks).save(f"{folder}/other/fundamental.safetensors")
    cases = [make_trainer("ddp", folder, 6), elsewhere, make_trainer("ddp", folder, 6)]
    cases[2][1].recipe = replace(cases[2][1].recipe, num_batches=100)
    checkpoint = f"{folder}/checkpoint-3"
    for (trainer, _), resume in zip(cases, (checkpoint, checkpoint, None), strict=True):
        try:
            trainer.train(resume_from_checkpoint=resume)
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_transformers_errors(tmp_path: Path) -> None:
    lost, stale, short = run_ranks(1, hf_errors, str(tmp_path))[0]
    assert "pass the set of the checkpoint as fundamental=FundamentalSet.load(...)" in stale
    assert "FundamentalSetError: training resumes at step 3, but there is no fundamental set" in lost
    assert "ScoreError: there are only 12 batches per rank to score on" in short


def masks_of(chosen: FundamentalSet) -> dict[str, Tensor]:
    """In memory: the file is replaced by the next training."""
    return {n: chosen.mask(n) for n in chosen.names}


def hf_twice(folder: str) -> tuple[float, list[float], str, str]:
    """Cross-validation with one Trainer, then another: overlap of the sets, their movement, an error, a trial's folder."""
    from transformers import Trainer
    from transformers.trainer_utils import HPSearchBackend

    trainer, callback = make_trainer("ddp", folder, STEPS)
    trainer.model_init = make_bert
    sets, moved = [], []
    for rows in (samples(), samples()[::-1]):
        trainer.train_dataset = rows
        trainer.train()
        masks, start = masks_of(callback.fundamental), make_bert().state_dict()
        way = {n: w - start[n] for n, w in weights_of(trainer).items() if n in masks}
        inside, outside = (torch.cat([w[masks[n] == chosen] for n, w in way.items()]) for chosen in (True, False))
        sets.append(FundamentalSet.from_masks(masks))
        moved.append(float((inside.square().mean() / outside.square().mean()).sqrt()))
    other = Trainer(make_bert(), trainer.args, train_dataset=samples(), callbacks=[callback])
    try:
        other.train()
        error = ""
    except EngineError as found:
        error = str(found)
    trainer.hp_search_backend, trainer._trial = HPSearchBackend.OPTUNA, SimpleNamespace(number=3)
    return sets[0].jaccard(sets[1]), moved, error, trainer_folder(trainer)


def test_each_training_has_a_set_of_its_own(tmp_path: Path) -> None:
    """Otherwise, in cross-validation, the set would have been scored on cases that are held out later."""
    ((overlap, moved, error, folder),) = run_ranks(1, hf_twice, str(tmp_path))
    assert overlap < 1
    assert max(moved) < 3 * min(moved)  # without the penalty, a set would have moved ten times as far
    assert "made for another Trainer: make one for each Trainer" in error
    assert folder == str(tmp_path / "run-3")


# -- Accelerate ---------------------------------------------------------------------------------------------------------


def accelerated(kind: str, level: str) -> tuple[str, int, dict[str, Tensor]]:
    import_deepspeed()
    from accelerate import Accelerator, DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs

    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    options: dict[str, Any] = {"cpu": True, "kwargs_handlers": [unused]}
    if kind != "ddp":
        ds_config = {
            **ZERO,
            "train_micro_batch_size_per_gpu": SIZE,
            "gradient_accumulation_steps": 2,
            "zero_optimization": {"stage": int(kind[-1])},
        }
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # as its launcher does; else it finds one process without a GPU
        plugin = DeepSpeedPlugin(hf_ds_config=ds_config, zero3_init_flag=False)
        options = {"deepspeed_plugin": plugin, "kwargs_handlers": [InitProcessGroupKwargs(backend="gloo")]}
    accelerator = Accelerator(gradient_accumulation_steps=2, **options)
    net = make_net()
    model, optimizer = accelerator.prepare(net, make_optimizer("momentum", net.parameters()))
    chosen = FundamentalSet.from_masks({"blocks.0.up.weight": torch.ones(11, 13, dtype=torch.bool)}, head=HEAD)
    attach_penalty(model, chosen, 0.1, optimizer=optimizer, level=level)  # type: ignore[arg-type]
    for batch in make_batches(6, 2 * SIZE, torch.float32):
        with accelerator.accumulate(model):
            accelerator.backward(loss_fn(model, my_part(batch)))
            optimizer.step()
            optimizer.zero_grad()
    state = Prepared(kind, model, optimizer, None).state()
    return accelerator.distributed_type.value, accelerator.num_processes, state


@pytest.mark.parametrize("kind", ["ddp", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("level", ["gradient", "update"])
def test_accelerate(kind: str, level: str) -> None:
    """What Accelerate prepared: the wrapped model and its own kind of optimizer, which is unwrapped."""
    net = make_net()
    optimizer = make_optimizer("momentum", net.parameters())
    batches = make_batches(6, 2 * SIZE, torch.float32)
    held = net.blocks[0].up.weight
    for pair in zip(batches[::2], batches[1::2], strict=True):
        optimizer.zero_grad()
        for batch in pair:
            (loss_fn(net, batch) / 2).backward()
        old = held.detach().clone()
        if level == "gradient":
            held.grad *= 0.1
        optimizer.step()
        if level == "update":
            held.data.copy_(old + 0.1 * (held.data - old))
    for engine, processes, state in run_ranks(2, accelerated, kind, level):
        assert (engine, processes) == ("MULTI_CPU" if kind == "ddp" else "DEEPSPEED", 2)
        moved = {n: p.detach() for n, p in net.named_parameters() if not n.startswith("unused")}  # flat buffers decay it
        assert worst({n: w.view_as(moved[n]) for n, w in state.items() if n in moved}, moved) <= 1e-6


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_accelerate_configurations_are_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by Accelerate's own reader, which refuses keys that it does not know."""
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(ROOT / f"configs/accelerate/{name}.yaml"))
    engine = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}[name]
    assert (found.distributed_type.value, found.mixed_precision, found.num_processes) == (engine, "bf16", 8)
    if name == "zero3":
        clipping = json.loads((ROOT / found.deepspeed_config["deepspeed_config_file"]).read_text())["gradient_clipping"]
        assert clipping == 0.0
    if name == "fsdp2":
        from accelerate import FullyShardedDataParallelPlugin

        for key, value in found.fsdp_config.items():
            monkeypatch.setenv(key.upper(), str(value).lower() if isinstance(value, bool) else str(value))
        plugin = FullyShardedDataParallelPlugin()
        assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)


def clipping_by_default() -> str:
    import logging

    from dcft_dist.engines import zero
    from dcft_dist.engines.find import find_engine

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    zero.log.addHandler(handler)
    deepspeed = import_deepspeed()
    net = make_net()
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
    model, *_ = deepspeed.initialize(model=net, optimizer=make_optimizer("sgd", net.parameters()), config=config)
    find_engine(model), find_engine(model)
    return "|".join(lines)


def test_the_clipping_that_nobody_asked_for_is_reported_once() -> None:
    text = run_ranks(1, clipping_by_default)[0]
    assert text.startswith("DeepSpeed clips gradients to a norm of 1.0") and "|" not in text


# -- Lightning ----------------------------------------------------------------------------------------------------------


def lightning_run(strategy: str, folder: str, steps: int, resume: str | None) -> tuple[int, dict[str, Tensor]]:
    import pytorch_lightning as pl
    from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    from dcft_dist.integrations.lightning import DCFTCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.bert = make_bert()

        def configure_model(self) -> None:
            if strategy == "fsdp2" and not hasattr(self.bert, "set_requires_gradient_sync"):
                mesh = self.device_mesh["data_parallel"]
                for layer in self.bert.bert.encoder.layer:
                    fully_shard(layer, mesh=mesh)
                fully_shard(self.bert, mesh=mesh)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return bert_loss(self.bert, batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self) -> Any:
            # What was saved at the end of an epoch goes on at the start of the next one.
            rows = samples()[3 * 2 * SIZE :] if resume else samples()[: steps * 2 * SIZE]
            sampler = DistributedSampler(rows, shuffle=False)  # type: ignore[arg-type, var-annotated]
            return DataLoader(rows, batch_size=SIZE, sampler=sampler)  # type: ignore[arg-type]

    callback = DCFTCallback(
        lambda m, b: bert_loss(m.bert, b), head="bert.classifier", fraction=0.2, num_batches=2 if resume is None else 1
    )
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=DDPStrategy() if strategy == "ddp" else ModelParallelStrategy(2, 1),
        use_distributed_sampler=False, max_epochs=2 if resume else 1, callbacks=[callback], default_root_dir=folder,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Module()
    trainer.fit(module, ckpt_path=resume)
    assert trainer.world_size == 2
    trainer.save_checkpoint(f"{folder}/half.ckpt")
    full = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in module.bert.named_parameters()}
    return callback.fundamental.num_selected, {n: p.detach().clone() for n, p in full.items()}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_lightning(strategy: str, tmp_path: Path) -> None:
    chosen, expected = reference()
    for selected, state in run_ranks(2, lightning_run, strategy, str(tmp_path), STEPS, None):
        assert selected == chosen.num_selected and worst(state, expected) <= 1e-6
    # Half of it, then the rest from the checkpoint, which alone knows the set.
    run_ranks(2, lightning_run, strategy, str(tmp_path / "half"), 3, None)
    (tmp_path / "half/fundamental.safetensors").unlink()
    for selected, state in run_ranks(
        2, lightning_run, strategy, str(tmp_path / "half"), STEPS, str(tmp_path / "half/half.ckpt")
    ):
        assert selected == chosen.num_selected and worst(state, expected) <= 1e-6


def lightning_twice(folder: str) -> float:
    """The overlap of the sets of two fits with one callback, each with its own Trainer, module and data."""
    import pytorch_lightning as pl

    from dcft_dist.integrations.lightning import DCFTCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.bert = make_bert()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return bert_loss(self.bert, batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = DCFTCallback(lambda m, b: bert_loss(m.bert, b), head="bert.classifier", fraction=0.2, num_batches=2)
    sets = []
    for rows in (samples(), samples()[::-1]):
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_epochs=1, callbacks=[callback], default_root_dir=folder, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Module(), DataLoader(rows, batch_size=SIZE))  # type: ignore[arg-type]
        sets.append(FundamentalSet.from_masks(masks_of(callback.fundamental)))
    return float(sets[0].jaccard(sets[1]))


def test_each_fit_has_a_set_of_its_own(tmp_path: Path) -> None:
    assert run_ranks(1, lightning_twice, str(tmp_path))[0] < 1
