"""Feeds the readers of files with bytes that libFuzzer makes, guided by coverage, for some minutes each.

    pip install atheris
    python benchmarks/fuzz_readers.py [SECONDS]

The checks are those of tests/faults/inputs.py: only errors of this package. One process for each kind of file; it prints how
many inputs each one tried, and fails with the first input that a reader does not understand.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

KINDS = ("csv", "jsonl", "npz", "safetensors", "index", "toml", "progress", "attempts", "manifest")


def fuzz(kind: str, seconds: int) -> None:
    import atheris

    with atheris.instrument_imports(include=["dcft_dist"]):
        from tests.faults import inputs

    folder = Path(tempfile.mkdtemp())

    def one(content: bytes) -> None:
        if kind in ("csv", "jsonl"):
            inputs.check_table((f".{kind}", content), folder)
        elif kind == "npz":
            inputs.check_pack(content, folder)
        elif kind in ("safetensors", "index"):
            name = "model.safetensors" if kind == "safetensors" else "model.safetensors.index.json"
            inputs.check_model((name, content), folder)
        elif kind == "toml":
            inputs.check_toml(content, folder)
        else:
            names = {"progress": "progress.json", "attempts": "attempts.jsonl"}
            inputs.check_small(names.get(kind, "checkpoints/step_00000001/manifest.json"), content, folder)

    atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", "-max_len=2000", "-verbosity=0", "-print_final_stats=1"], one)
    atheris.Fuzz()


def main() -> None:
    if len(sys.argv) == 3:
        fuzz(sys.argv[2], int(sys.argv[1]))
        return
    seconds = sys.argv[1] if len(sys.argv) > 1 else "120"
    print("| file | inputs |\n|---|---|", flush=True)
    for kind in KINDS:
        done = subprocess.run([sys.executable, __file__, seconds, kind], capture_output=True, text=True)
        tried = re.search(r"number_of_executed_units: *(\d+)", done.stderr)
        if done.returncode or not tried:
            raise SystemExit(f"{kind}: {done.stdout[-2000:]}\n{done.stderr[-3000:]}")
        print(f"| {kind} | {int(tried[1]):,} |", flush=True)


if __name__ == "__main__":
    main()
