"""Which share of the weights `selection.fraction = "auto"` selects, for several tasks and models.

    python benchmarks/auto_fraction.py --folder runs/auto

Three tasks and three models, two criteria, three seeds. It takes two hours on one core. Only training and validation data
are used. Runs that are already in the folder are not run again. docs/studies.md says which packages the tasks need.
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
    """The validation losses of one run at each share. Both criteria use the head of the `taylor_squared` run."""
    prefix, words = task.replace(", ", "."), [*TASKS[task], *HOW]
    name, first = f"{prefix}.{criterion}.{seed}", folder / f"{prefix}.taylor_squared.{seed}"
    file = folder / name / "fundamental.safetensors"
    if not file.exists():
        words += ["--runs_dir", str(folder), "--name", name, "--seed", str(seed), "--importance.criterion", criterion]
        words += ["--start_from", str(first)] if first.exists() and first.name != name else []
        subprocess.run([sys.executable, "-m", "dcft_dist.cli", "train", *words], check=True, stdout=subprocess.DEVNULL)
    losses: list[dict[str, float]] = FundamentalSet.load(file).info.extra["fraction_curve"]
    return losses


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--folder", type=Path, default=Path("runs/auto"))
    arguments.add_argument("--tasks", nargs="+", metavar="NAME", help="only tasks with NAME in their names (default: all)")
    options = arguments.parse_args()
    folder, has_header = options.folder, False
    for task in (t for t in TASKS if not options.tasks or any(part in t for part in options.tasks)):
        for criterion in ("taylor_squared", "fisher"):
            curves = [curve(folder, task, criterion, seed) for seed in range(3)]
            if not has_header:
                columns = ["task", "criterion", "share taken, by seed", *(f"{row['fraction']:.1%}" for row in curves[0])]
                print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
                has_header = True
            taken = ", ".join(f"{max(c, key=lambda row: row['gap'])['fraction']:.1%}" for c in curves)
            gaps = [f"{sum(c[i]['gap'] for c in curves) / len(curves):+.3f}" for i in range(len(curves[0]))]
            print("| " + " | ".join([task, criterion, taken, *gaps]) + " |", flush=True)
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
