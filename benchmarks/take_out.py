"""Takes each safeguard against faults out of a copy of the package, and runs its test, which must then fail.

    python benchmarks/take_out.py [WORD ...]     only the entries whose names contain a word

What is taken out stands in take_out.toml. It prints a table of docs/results/faults.md.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]


def fails_without(root: Path, file: str, changes: list[tuple[str, str]], test: str) -> str:
    """Runs a test without a safeguard. Returns what went wrong, in words."""
    path = root / "dcft_dist" / file
    whole = path.read_text()
    text = whole
    for old, new in changes:
        if old not in text:
            return "NOT FOUND in the code"
        text = text.replace(old, new)
    path.write_text(text)
    try:
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", test]
        done = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True)
    finally:
        path.write_text(whole)
    return {0: "PASSES", 1: "fails"}.get(done.returncode, f"ended with {done.returncode}: {done.stdout[-200:]}")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("dcft_dist", "tests", "configs", "launch", "slurm", "docs", "pyproject.toml"):
            source = ROOT / name
            shutil.copytree(source, root / name) if source.is_dir() else shutil.copyfile(source, root / name)
        print(f"{datetime.now(UTC):%Y-%m-%d}\n\n| safeguard | its test without it |\n|---|---|", flush=True)
        wrong = 0
        safeguards = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())["safeguard"]
        for it in safeguards:
            if sys.argv[1:] and not any(word in it["name"] for word in sys.argv[1:]):
                continue
            found = fails_without(root, it["file"], it["changes"], it["test"])
            wrong += found != "fails"
            print(f"| {it['name']} | {found}: `{it['test'].removeprefix('tests/').partition('[')[0]}` |", flush=True)
        print(f"\n{wrong} of {len(safeguards)} safeguards have a test that does not see their absence")


if __name__ == "__main__":
    main()
