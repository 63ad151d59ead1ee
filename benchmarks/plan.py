"""How much memory foundation models need on up to 1,024 GPUs, forecast by `dcft plan`, which needs no GPU.

    python benchmarks/plan.py    (prints the first table of docs/results/plan.md in half an hour; arguments: names of models)
    python benchmarks/plan.py --recipes    (the second one, in a quarter of an hour; arguments: names of recipes)

Numbers are GiB on each rank, with FSDP2, bfloat16, AdamW, and one sample (224 x 224 pixels, or 512 tokens) on each rank.
`plain`: the peak of a step without a penalty. `update` and `before`: the peak of a step with the penalty at the update level
and before the reduction; `+%`: over the plain step. `scoring`: the peak of a score batch. `mask`: the bits of the set, in
MiB. `before` is left out for 70 billion weights, because the planning process would need real memory for their bits.

Recipes are the configurations in configs/, with models of the size that they are for.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

MODELS = {"vit_large": 1, "vit_huge": 1, "vit_giant": 1, "decoder_7b": 1, "decoder_70b": 64}  # name -> fewest ranks to show
RANKS = (1, 8, 64, 512, 1024)


_LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


# Recipe -> numbers of ranks; class of transformers' configuration and sizes of the model, if its folder has to be made.
RECIPES: dict[str, tuple[tuple[int, ...], str, dict[str, Any]]] = {
    "reports_bert": ((1,), "BertConfig", {}),
    "encoder_sam": ((4,), "SamConfig", {}),
    "swin_unetr": ((4,), "", {}),
    "pathology_vit_giant": (
        (8,),
        "Dinov2Config",
        {
            "hidden_size": 1536,
            "num_hidden_layers": 40,
            "num_attention_heads": 24,
            "use_swiglu_ffn": True,
            "patch_size": 14,
            "image_size": 518,
        },
    ),
    "instructions_7b": ((8,), "LlamaConfig", {}),
    "instructions_70b": ((32, 64), "LlamaConfig", _LLAMA_70B),
    "instructions_70b_lora": ((8,), "LlamaConfig", _LLAMA_70B),
}


def planned(model: str, ranks: int, *words: str) -> dict[str, Any]:
    """The numbers that `dcft plan --json` prints; sizes are bytes."""
    command = [sys.executable, "-m", "dcft_dist.cli", "plan", "--model", model, "--ranks", str(ranks), *words]
    process = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    return json.loads(process.stdout)  # type: ignore[no-any-return]


def recipes(chosen: list[str]) -> None:
    """Prints the table of recipes."""
    import transformers

    columns = ("recipe", "weights", "GPUs", "micro-batch", "micro-batches", "checkpointing", "parameters", "optimizer")
    print(f"| {' | '.join([*columns, 'activations', 'plain', 'DCFT', 'scoring', 'host'])} |\n|{' --- |' * 13}")
    for recipe in chosen:
        numbers, kind, sizes = RECIPES[recipe]
        with tempfile.TemporaryDirectory() as folder:
            if kind:
                getattr(transformers, kind)(**sizes).save_pretrained(folder)
            for ranks in numbers:
                config = str(Path(__file__).parents[1] / f"configs/{recipe}.toml")
                found = planned(config, ranks, *(["--model.weights", folder] if kind else []))
                request, step = found["request"], found["dcft_step"]
                parts = [step["parameters"], step["optimizer"], step["activations"]]
                sizes_of = [*parts, found["plain_peak"], found["dcft_peak"], found["score_peak"], found["host_peak"]]
                cells = [recipe, f"{found['weights']:,}", ranks, request["micro_batch"], request["accumulation"]]
                cells += [request["activation_checkpointing"], *(f"{size / 2**30:.2f}" for size in sizes_of)]
                print(f"| {' | '.join(map(str, cells))} |", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--recipes"]:
        recipes(sys.argv[2:] or list(RECIPES))
        print(f"\n{datetime.date.today()}, torch {torch.__version__}, on a CPU.")
        return
    chosen = sys.argv[1:] or list(MODELS)
    print("| model | ranks | plain | update | +% | mask MiB | before | +% | mask MiB | scoring | fits 80 GiB |")
    print(f"|{' --- |' * 11}")
    for model, fewest in ((name, MODELS[name]) for name in chosen):
        for ranks in RANKS:
            if ranks < fewest:
                continue
            update = planned(model, ranks, "--level", "update")
            before = planned(model, ranks, "--level", "gradient") if fewest == 1 else None
            cells = [model, ranks, f"{update['plain_peak'] / 2**30:.2f}"]
            for forecast in (update, before):
                if forecast is None:
                    cells += ["", "", ""]
                    continue
                added = 100 * (forecast["dcft_peak"] / forecast["plain_peak"] - 1)
                cells += [f"{forecast['dcft_peak'] / 2**30:.2f}", f"{added:+.1f}", f"{forecast['bits'] / 2**20:,.1f}"]
            cells += [f"{update['score_peak'] / 2**30:.2f}", "yes" if update["fits"] else "no"]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    print(f"\n{datetime.date.today()}, torch {torch.__version__}, on a CPU.")


if __name__ == "__main__":
    main()
