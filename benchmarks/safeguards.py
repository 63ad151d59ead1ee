"""What the comparison of data at a start and of replicas at a log costs, as a part of a run of an hour.

    python benchmarks/safeguards.py [FOLDER]      # writes 100,000 pictures of 60 kB to FOLDER (6 GB), and removes them

The pictures are read from the page cache as far as they fit into memory; a network file system takes longer for each file.
"""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dcft_dist.data.contents import Contents
from dcft_dist.data.splits import Split
from dcft_dist.engines.box import Box
from dcft_dist.engines.checksum import checksum

FILES, SIZE, HOUR = 100_000, 60_000, 3600.0


def pictures(folder: Path) -> list[Path]:
    noise = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    files = []
    for i in range(FILES):
        place = folder / f"{i // 1000:03}"
        if i % 1000 == 0:
            place.mkdir(parents=True)
        noise[:8] = np.frombuffer(i.to_bytes(8, "little"), np.uint8)
        (place / f"{i}.bin").write_bytes(noise.tobytes())
        files.append(place / f"{i}.bin")
    return files


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()) / "pictures"
    torch.set_num_threads(1)
    try:
        files = pictures(folder)
        splits = {"train": Split(files, [0] * FILES, [str(file) for file in files])}
        rows = []
        first = Contents(splits, folder / "kept")
        rows.append(("first start: list the files", seconds(lambda: Contents(splits, folder / "kept"))))
        rows.append(("first start: stamps", seconds(first.stamp)))
        rows.append(("first start: keep them", seconds(lambda: first.keep("now-00000"))))
        rows.append(("first read: whole hashes", seconds(first.read_all)))
        rows.append(("first read: keep them", seconds(lambda: first.keep("read-00000"))))
        later = Contents(splits, folder / "kept")
        rows.append(("later start: read what is kept", seconds(lambda: (later.compact(), later.load()))))
        rows.append(("later start: stamps, compared", seconds(later.stamp)))
        rows.append(("later start: whole hashes (none is taken)", seconds(later.read_all)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    weights = torch.randn(22_713_216)  # as many as MiniLM has
    box = Box.flat(len(weights), 0, len(weights))
    checksum(weights, box)
    once = min(seconds(lambda: checksum(weights, box)) for _ in range(5))
    layer = torch.nn.TransformerEncoderLayer(384, 12, 1536, batch_first=True, dropout=0.0)
    encoder = torch.nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
    batch = torch.randn(16, 48, 384)

    def step() -> None:
        encoder.zero_grad()
        encoder(batch).square().mean().backward()

    step()
    one = min(seconds(step) for _ in range(3))
    print("# Cost of the safeguards\n")
    machine = f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}"
    print(f"{datetime.date.today()}, {machine}, one process. `python benchmarks/safeguards.py`.\n")
    print(f"{FILES:,} files of {SIZE:,} bytes on a local disk:\n")
    print("| what | seconds | share of a run of an hour |\n|---|---|---|")
    for what, spent in rows:
        print(f"| {what} | {spent:.1f} | {spent / HOUR:.2%} |")
    total = sum(spent for _, spent in rows[:5])
    print(f"| **all of a first start** | {total:.1f} | {total / HOUR:.2%} |")
    print(f"| **all of a later start** | {sum(s for _, s in rows[5:]):.1f} | {sum(s for _, s in rows[5:]) / HOUR:.2%} |\n")
    print("Ranks of one host share the stamps, and all ranks the hashes.\n")
    print(
        "Replicas under DDP: a checksum of 22.7 million weights at each log, against forward and backward of an encoder of"
    )
    print(f"MiniLM's size on 16 texts of 48 tokens (one thread): {once:.3f} s against {one:.3f} s. With a log every")
    print(f"10 steps of 32 texts that is {once / (20 * one):.2%} of the time of the steps.")


if __name__ == "__main__":
    main()
