"""Samples a second of the trainer beside a hand-written loop and transformers' Trainer, on the same model and batches.

    python benchmarks/throughput.py icd.toml --ranks 2
    python benchmarks/throughput.py mri.toml --ranks 1

The arms take turns in one process for each rank, under DDP if there are two. The hand-written loop has its batches ready,
and so does transformers' Trainer, of which only the steps count: neither reads data. `of the loop`: median over rounds of
the loop's seconds divided by the arm's. The columns after it say where a step of the trainer goes.
"""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from side_by_side import on_ranks, parser, show
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments

from dcft_dist import score_importance, select_fundamental
from dcft_dist.config.toml import load_config
from dcft_dist.distributed.world import World
from dcft_dist.runs.writer import RunWriter
from dcft_dist.train.context import RunContext, make_context, read_materials
from dcft_dist.train.measure import speed_of
from dcft_dist.train.methods import begin
from dcft_dist.train.speed import PARTS
from dcft_dist.train.steps import Training

CPU = torch.device("cpu")
Steps = list[list[dict[str, Tensor]]]  # micro-batches of each step
TOTAL = 10_000  # steps of the learning rate's schedule: more than are made


class WithLoss(nn.Module):
    """The model of a run, in the form that transformers' Trainer takes."""

    accepts_loss_kwargs = False

    def __init__(self, run: RunContext, model: nn.Module) -> None:
        super().__init__()
        self.run, self.model = run, model

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        outputs = self.run.outputs(self.model, batch)
        return {"loss": self.run.objective.loss(outputs, batch["labels"])}


class Timed(TrainerCallback):
    """Sums the seconds of the steps of transformers' Trainer."""

    def __init__(self) -> None:
        self.seconds, self._began = 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.seconds += time.perf_counter() - self._began


def context(config_name: str, method: str, folder: str, engine: str) -> RunContext:
    """Data and model of a run, as `dcft train` prepares them."""
    words = ["--engine", engine, "--method", method, "--runs_dir", folder, "--name", method, "--data.check", "false"]
    config = load_config(config_name, words)
    writer = RunWriter.of(config)
    writer.open(config)
    return make_context(config, World(dist.get_rank(), dist.get_world_size(), CPU), writer)


def trainer_of(config_name: str, method: str, folder: str, engine: str) -> tuple[RunContext, Training]:
    """A training of a run, with a set of the largest weights if the method takes one."""
    run = context(config_name, method, folder, engine)
    chosen = None
    if method == "dcft":
        chosen = select_fundamental(score_importance(run.model, None, None, head=run.pretrained.head, criterion="magnitude"))
    training = Training(run)
    training.begin(begin(run.prepared, chosen, run.config, run.pretrained.head))
    training.speed = speed_of(run)
    return run, training


def hand_written(run: RunContext, model: nn.Module, steps: Steps) -> Callable[[], None]:
    """A plain loop over all steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def loop() -> None:
        model.train()
        for batches in steps:
            optimizer.zero_grad()
            for i, batch in enumerate(batches):
                last = i == len(batches) - 1
                with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext():
                    outputs = run.outputs(model, batch)
                    (run.objective.loss(outputs, batch["labels"]) / len(batches)).backward()
            optimizer.step()

    return loop


def hugging_face(
    run: RunContext, model: nn.Module, steps: list[list[dict[str, Tensor]]], folder: str
) -> Callable[[], float]:
    """transformers' Trainer on the same micro-batches; returns the seconds of its steps."""
    micro = [batch for batches in steps for batch in batches]
    arguments = TrainingArguments(
        f"{folder}/hf",
        use_cpu=True,
        max_steps=len(steps),
        per_device_train_batch_size=1,  # each item is a micro-batch
        gradient_accumulation_steps=len(steps[0]),
        learning_rate=1e-6,
        max_grad_norm=0.0,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,
    )
    timed = Timed()

    class Given(Trainer):
        def get_train_dataloader(self) -> Any:
            return micro

    trainer = Given(WithLoss(run, model), arguments, train_dataset=micro, callbacks=[timed])  # type: ignore[arg-type]

    def loop() -> float:
        before = timed.seconds
        trainer.train()
        if dist.get_world_size() > 1 and not isinstance(trainer.model_wrapped, DistributedDataParallel):
            raise SystemExit("transformers' Trainer does not reduce the gradients")
        return timed.seconds - before

    return loop


def measured(config_name: str, rounds: int, number: int) -> list[dict[str, Any]]:
    """Rows of the table, on one rank."""
    logging.disable(logging.WARNING)
    ranks, folder = dist.get_world_size(), tempfile.mkdtemp()
    for name, value in (("RANK", dist.get_rank()), ("LOCAL_RANK", dist.get_rank()), ("WORLD_SIZE", ranks)):
        os.environ[name] = str(value)  # as torchrun does: transformers' Trainer then uses DDP
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    engine = "ddp" if ranks > 1 else "single"
    arms = {f"dcft train, {m}": trainer_of(config_name, m, f"{folder}/{dist.get_rank()}", engine) for m in ("full", "dcft")}
    run = context(config_name, "bitfit", f"{folder}/{dist.get_rank()}", "single" if ranks == 1 else "ddp")
    plain, other = (build(run) for _ in range(2))
    model = DistributedDataParallel(plain, find_unused_parameters=True) if ranks > 1 else plain
    steps = [next(iter(arms.values()))[1]._micro_batches(step) for step in range(number)]
    loop, hf = hand_written(run, model, steps), hugging_face(run, other, steps, folder)
    seconds: dict[str, list[float]] = {name: [] for name in ("hand-written loop", *arms, "transformers.Trainer")}
    done = 0
    for _ in range(rounds + 1):  # the first round is to warm up
        dist.barrier()
        seconds["hand-written loop"].append(timed(loop))
        for name, (_, training) in arms.items():
            seconds[name].append(timed(partial(go_on, training, range(done, done + number))))
        dist.barrier()
        seconds["transformers.Trainer"].append(hf())
        done += number
    rows = []
    for name, values in seconds.items():
        pairs = zip(seconds["hand-written loop"][1:], values[1:], strict=True)
        row: dict[str, Any] = {
            "arm": name,
            "samples/s": run.config.train.global_batch * number / statistics.median(values[1:]),
        }
        row["of the loop"] = statistics.median(a / b for a, b in pairs)
        if name in arms:
            report = arms[name][1].speed.report(ranks)  # type: ignore[union-attr]
            total = sum(report[f"speed/{part}_s"] for part in PARTS)
            row |= {f"{part} %": 100 * report[f"speed/{part}_s"] / total for part in PARTS}
        rows.append(row)
    return rows


def build(run: RunContext) -> nn.Module:
    """Another copy of the run's model, with all weights trained."""
    materials = read_materials(run.config)
    if materials.pretrained.loading:
        materials.pretrained.loading.into_whole(materials.pretrained.module, CPU)
    return materials.pretrained.module.requires_grad_(True)


def go_on(training: Training, steps: range) -> None:
    """Makes steps as `dcft train` does between two logs."""
    for step in steps:
        training.step(step, TOTAL, None)
    training.settle()


def timed(call: Callable[[], Any]) -> float:
    """Seconds until the last rank is done."""
    began = time.perf_counter()
    call()
    dist.barrier()
    return time.perf_counter() - began


def on_rank(config_name: str, rounds: int, number: int, threads: int) -> list[dict[str, Any]]:
    """`measured` with so many threads."""
    torch.set_num_threads(threads)
    return measured(config_name, rounds, number)


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("config", help="icd.toml or mri.toml")
    arguments.add_argument("--ranks", type=int, default=1)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--steps", type=int, default=6, help="steps of each arm in a round")
    options = arguments.parse_args()
    rows = on_ranks(options.ranks, on_rank, options.config, options.rounds, options.steps, 2 // options.ranks or 1)[0]
    show(rows, options.json, options.rounds)


if __name__ == "__main__":
    main()
