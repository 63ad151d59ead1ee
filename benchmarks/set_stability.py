"""How much the fundamental set depends on the number of ranks and the precision: Jaccard indices of the top 10 %.

    python benchmarks/set_stability.py

The model is MiniLM with the warmed-up head of a finished run (--head FILE). The task is ICD-10-CM chapters, with 256
training texts in score batches of 32. FSDP2 runs on one and two gloo ranks, in float32 and bfloat16 (float32 shards and
reduction).
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from dcft_dist import FundamentalSet, score_importance, select_fundamental
from dcft_dist.config.schema import Config
from dcft_dist.data.batches import Batch, micro_batches, order
from dcft_dist.data.tasks import load_task
from dcft_dist.engines.prepared import WrapOptions
from dcft_dist.engines.wrap import prepare
from dcft_dist.models.build import build_model

CPU = torch.device("cpu")


def loss_fn(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    return torch.nn.functional.cross_entropy(model(**inputs).float(), batch["labels"])


def score(rank: int, ranks: int, folder: str, head: str, bf16: bool) -> None:
    """Entry point of one rank: scores, selects, and saves the set as `<folder>/<ranks>.<bf16>`."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store.{ranks}.{bf16}", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    config = Config(name="stability")
    data = load_task(config)
    pretrained = build_model(config, len(data.class_names))
    pretrained.module.load_state_dict(load_file(head), strict=False)
    tokens = pretrained.processor(data.train)
    options = WrapOptions("fsdp2", CPU, pretrained.blocks, bf16=bf16)
    wrapped = prepare(pretrained.module, options, lambda weights: torch.optim.SGD([p for _, p, _ in weights], lr=0.1)).model
    indices = order(0, 0, len(tokens))[:256]
    items = [b for i in range(0, 256, 32) for b in micro_batches(indices[i : i + 32], rank, ranks, 32, tokens, CPU)]
    select_fundamental(score_importance(wrapped, items, loss_fn, head="head"), 0.1).save(f"{folder}/{ranks}.{bf16}")
    dist.destroy_process_group()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--head", default="runs/icd_dcft/head.safetensors", help="head of a finished run")
    head = arguments.parse_args().head
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2):
            for bf16 in (False, True):
                torch.multiprocessing.spawn(score, (ranks, folder, head, bf16), nprocs=ranks)
        files = [file for file in sorted(Path(folder).glob("*.[TF]*")) if "store" not in file.name]
        sets = {file.name: FundamentalSet.load(file) for file in files}
        print("| sets compared | Jaccard index |\n|---|---|")
        for title, first, second in (
            ("float32, 1 and 2 ranks", "1.False", "2.False"),
            ("bfloat16, 1 and 2 ranks", "1.True", "2.True"),
            ("float32 and bfloat16, 1 rank", "1.False", "1.True"),
        ):
            print(f"| {title} | {sets[first].jaccard(sets[second]):.5f} |")


if __name__ == "__main__":
    main()
