"""Which share `selection.fraction = "auto"` takes: three tasks and models, two criteria, three seeds. Two hours on one core.

    python benchmarks/auto_fraction.py --folder runs/auto

Training and validation data alone. Finished runs in the folder are read again. Packages of the tasks: docs/studies.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from side_by_side import machine

from dcft_dist import FundamentalSet

SMALL = ["--task.train_per_class", "30", "--task.validation_per_class", "25"]
ALL = [word for split in ("train", "validation", "test") for word in (f"--task.{split}_per_class", "999")]
PATCHES = ["--task.train_per_class", "50"]
CONVOLUTIONAL = ["--import_roots", '["benchmarks"]', "--model.build", "convolutional.efficientnet_lite0"]
CONVOLUTIONAL += ["--model.head", '["_fc"]', "--model.args.num_classes", "num_outputs"]
TASKS = {
    "icd10cm_chapter, MiniLM": ["icd.toml", *SMALL],
    "drug_review, MiniLM": ["icd.toml", "--task.name", "drug_review", "--task.max_tokens", "128", *ALL],
    "mri_region, DINOv2": ["mri.toml", *PATCHES],
    "mri_region, EfficientNet-Lite0": ["mri.toml", *PATCHES, *CONVOLUTIONAL],
}
HOW = ["--engine", "single", "--selection.fraction", "auto", "--until", "select", "--importance.num_samples", "384"]


def curve(folder: Path, task: str, criterion: str, seed: int) -> list[dict[str, float]]:
    """Validation losses of one run by share; its head is that of the first criterion."""
    begin, words = task.replace(", ", "."), [*TASKS[task], *HOW]
    name, first = f"{begin}.{criterion}.{seed}", folder / f"{begin}.taylor_squared.{seed}"
    file = folder / name / "fundamental.safetensors"
    if not file.exists():
        words += ["--runs_dir", str(folder), "--name", name, "--seed", str(seed), "--importance.criterion", criterion]
        words += ["--start_from", str(first)] if first.exists() and first.name != name else []
        subprocess.run([sys.executable, "-m", "dcft_dist.cli", "train", *words], check=True, stdout=subprocess.DEVNULL)
    found: list[dict[str, float]] = FundamentalSet.load(file).info.extra["fraction_curve"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/auto"))
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="only those with this in their names (default: all)")
    given = parser.parse_args()
    folder, shown = given.folder, False
    for task in (t for t in TASKS if not given.tasks or any(word in t for word in given.tasks)):
        for criterion in ("taylor_squared", "fisher"):
            curves = [curve(folder, task, criterion, seed) for seed in range(3)]
            if not shown:
                columns = ["task", "criterion", "share taken, by seed", *(f"{row['fraction']:.1%}" for row in curves[0])]
                print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
                shown = True
            taken = ", ".join(f"{max(c, key=lambda row: row['gap'])['fraction']:.1%}" for c in curves)
            gaps = [f"{sum(c[i]['gap'] for c in curves) / len(curves):+.3f}" for i in range(len(curves[0]))]
            print("| " + " | ".join([task, criterion, taken, *gaps]) + " |", flush=True)
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
