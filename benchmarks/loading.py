"""Memory of reading a checkpoint into a sharded model: the peak of each rank over its share of the weights.

    python benchmarks/loading.py --folder /tmp/decoder_7b --ranks 4 --layers 32 --dtype bfloat16
    python benchmarks/loading.py --folder /tmp/decoder_3b --ranks 4 --layers 16

Writes a checkpoint of random bfloat16 weights in the shape of Llama 2 7B (13.5 GB with 32 layers), several files with an
index, and reads it under FSDP2 on CPU ranks as a run of configs/instructions_7b.toml does: into float32, the masters of a
training, or into the file's own type. Counted is anonymous memory, every 2 ms: pages of the files themselves can be dropped
by the kernel at any time.
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
    import transformers

    kind, sizes = MODELS["decoder_7b"]
    config = getattr(transformers, kind)(**{**sizes, "num_hidden_layers": layers})
    with on_meta():
        return transformers.AutoModelForCausalLM.from_config(config)


def write(folder: Path, layers: int) -> None:
    """A file for each block, and one for the rest."""
    if (folder / "model.safetensors.index.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, weight in build(layers).named_parameters():
        part = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"{part}.safetensors", {})[name] = weight.shape
    for file, shapes in files.items():
        draw = torch.Generator().manual_seed(zlib.crc32(file.encode()))
        noise = torch.empty(1 << 24, dtype=torch.bfloat16).normal_(generator=draw)
        tensors = {n: noise.repeat(-(-s.numel() // len(noise)))[: s.numel()].view(s).contiguous() for n, s in shapes.items()}
        save_file(tensors, folder / file)
    build(layers).config.save_pretrained(folder)
    where = {name: file for file, shapes in files.items() for name in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def anonymous_peak(call: Callable[[], Any]) -> tuple[Any, int]:
    """The call's result, and the highest rise of anonymous memory during it."""
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
    config, no_processor = load_config("instructions_7b.toml", ["--model.weights", folder]), cast("Any", None)

    def load() -> Any:
        found = custom_model(config, 0, no_processor)
        plan = WrapOptions("fsdp2", CPU, found.blocks)
        model = found.module.to(dtype)  # still without memory
        wrapped = prepare(model, plan, lambda weights: torch.optim.SGD([p for _, p, _ in weights], lr=0.1)).model
        found.loading.into(wrapped)
        return wrapped

    build(1)  # imports
    dist.barrier()
    begin = time.perf_counter()
    _, peak = anonymous_peak(load)
    return peak, time.perf_counter() - begin


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--folder", type=Path, default=Path("/tmp/decoder_7b"))
    options.add_argument("--ranks", type=int, default=4)
    options.add_argument("--layers", type=int, default=32)
    options.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    given = options.parse_args()
    dtype = getattr(torch, given.dtype)
    write(given.folder, given.layers)
    sizes = [p.numel() for p in build(given.layers).parameters()]
    found = on_ranks(given.ranks, read, str(given.folder), dtype)
    wanted = (sum(sizes) / given.ranks + max(sizes)) * dtype.itemsize
    peak = max(peak for peak, _ in found)
    show(
        [
            {
                "weights": sum(sizes),
                "ranks": given.ranks,
                "into": given.dtype,
                "GiB of all weights": sum(sizes) * dtype.itemsize / 2**30,
                "GiB of a share and the largest tensor": wanted / 2**30,
                "GiB at the peak of a rank": peak / 2**30,
                "over that": f"{peak / wanted:.2f}",
                "s": max(seconds for _, seconds in found),
            }
        ],
        given.json,
        1,
    )


if __name__ == "__main__":
    main()
