"""How much memory a rank needs to read a checkpoint into a sharded model, compared with its share of the weights.

    python benchmarks/loading.py --folder /tmp/decoder_7b --ranks 4 --layers 32 --dtype bfloat16
    python benchmarks/loading.py --folder /tmp/decoder_3b --ranks 4 --layers 16

The script writes a checkpoint of random bfloat16 weights in the shape of Llama 2 7B (13.5 GB with 32 layers): several files
with an index. CPU ranks then read it under FSDP2 as a run of configs/instructions_7b.toml does. They read it into float32,
the master weights of a training, or into the type of the file. The script samples anonymous memory every 2 ms. It does not
count pages of the files themselves, because the kernel can drop them at any time.
"""

from __future__ import annotations

import json
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from side_by_side import on_ranks, parser, show

from dcft_dist.config.toml import load_config
from dcft_dist.engines.meta import on_meta
from dcft_dist.engines.prepared import WrapOptions
from dcft_dist.engines.wrap import prepare
from dcft_dist.models.custom import custom_model
from dcft_dist.planning.planned_models import MODELS

CPU = torch.device("cpu")


def build(layers: int) -> Any:
    """The model on the meta device, without memory for its weights."""
    import transformers

    kind, sizes = MODELS["decoder_7b"]
    config = getattr(transformers, kind)(**{**sizes, "num_hidden_layers": layers})
    with on_meta():
        return transformers.AutoModelForCausalLM.from_config(config)


def write(folder: Path, layers: int) -> None:
    """Writes the checkpoint unless it exists: one file for each block, and one for all other weights."""
    if (folder / "model.safetensors.index.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, weight in build(layers).named_parameters():
        part = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"{part}.safetensors", {})[name] = weight.shape
    for file, shapes in files.items():
        generator = torch.Generator().manual_seed(zlib.crc32(file.encode()))
        noise = torch.empty(1 << 24, dtype=torch.bfloat16).normal_(generator=generator)
        tensors = {n: noise.repeat(-(-s.numel() // len(noise)))[: s.numel()].view(s).contiguous() for n, s in shapes.items()}
        save_file(tensors, folder / file)
    build(layers).config.save_pretrained(folder)
    weight_map = {name: file for file, shapes in files.items() for name in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def anonymous_peak(call: Callable[[], Any]) -> tuple[Any, int]:
    """The call's result, and by how many bytes anonymous memory rose during it, at most."""
    before, highest, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            highest[0] = max(highest[0], anonymous_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = call()
    finally:
        done.set()
        watcher.join()
    return result, highest[0] - before


def read(folder: str, dtype: torch.dtype) -> tuple[int, float]:
    """Peak bytes and seconds of one rank."""
    config, no_processor = load_config("instructions_7b.toml", ["--model.weights", folder]), cast("Any", None)

    def load() -> Any:
        pretrained = custom_model(config, 0, no_processor)
        wrap_options = WrapOptions("fsdp2", CPU, pretrained.blocks)
        model = pretrained.module.to(dtype)  # the weights are on the meta device and take no memory yet
        wrapped = prepare(model, wrap_options, lambda weights: torch.optim.SGD([p for _, p, _ in weights], lr=0.1)).model
        pretrained.loading.into(wrapped)
        return wrapped

    build(1)  # imports the libraries, so that their memory does not count
    dist.barrier()
    begin = time.perf_counter()
    _, peak = anonymous_peak(load)
    return peak, time.perf_counter() - begin


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--folder", type=Path, default=Path("/tmp/decoder_7b"))
    arguments.add_argument("--ranks", type=int, default=4)
    arguments.add_argument("--layers", type=int, default=32)
    arguments.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = arguments.parse_args()
    dtype = getattr(torch, options.dtype)
    write(options.folder, options.layers)
    sizes = [p.numel() for p in build(options.layers).parameters()]
    by_rank = on_ranks(options.ranks, read, str(options.folder), dtype)
    needed = (sum(sizes) / options.ranks + max(sizes)) * dtype.itemsize
    peak = max(peak for peak, _ in by_rank)
    show(
        [
            {
                "weights": sum(sizes),
                "ranks": options.ranks,
                "into": options.dtype,
                "GiB of all weights": sum(sizes) * dtype.itemsize / 2**30,
                "GiB of a share and the largest tensor": needed / 2**30,
                "GiB at the peak of a rank": peak / 2**30,
                "over that": f"{peak / needed:.2f}",
                "s": max(seconds for _, seconds in by_rank),
            }
        ],
        options.json,
        1,
    )


if __name__ == "__main__":
    main()
