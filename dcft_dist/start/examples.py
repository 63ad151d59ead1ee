"""Examples for `dcft COMMAND --help`."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "init": (
        "dcft init mine.toml --data images/ --gpus 4",
        "dcft init mine.toml --data notes.csv --input text --label code",
        "dcft init question.toml --study runs/mine",
    ),
    "doctor": ("dcft doctor", "dcft doctor --folder /scratch/me/runs"),
    "completion": ("dcft completion bash > ~/.local/share/bash-completion/completions/dcft",),
    "train": ("dcft train icd.toml", "dcft train mine.toml --optimizer.lr 1e-4 --name second_try"),
    "check": ("dcft check mine.toml --ranks 8", "dcft check mine.toml --data --sheet sheet.png"),
    "inspect": ("dcft inspect mine.toml",),
    "evaluate": ("dcft evaluate runs/mine --data.path other_hospital.csv",),
    "predict": (
        "dcft predict runs/mine --data.path new.csv --out predicted.csv",
        "dcft predict runs/fold0 runs/fold1 --data.path new.csv --flips",
    ),
    "delta": ("dcft delta runs/mine mine.delta", "dcft delta runs/mine mine.delta --apply model/"),
    "shira": ("dcft shira runs/mine adapter/",),
    "export": ("dcft export runs/mine model/", "dcft export runs/mine model.onnx --to onnx"),
    "push": ("dcft push runs/mine my-lab/my-model",),
    "interpolate": ("dcft interpolate runs/mine",),
    "status": ("dcft status runs/mine", "dcft status mine.toml --verdict"),
    "verify": ("dcft verify runs/mine",),
    "report": ("dcft report runs/mine --examples 12", "dcft report runs/study --pictures pictures/"),
    "table": ("dcft table runs/mine runs/other", "dcft table runs/study --format tex"),
    "compare": ("dcft compare studies/smoke.toml --workers 2", "dcft compare study.toml --data.path pathmnist.npz"),
    "submit": (
        "dcft submit mine.toml --nodes 2 --gpus-per-node 4 --time 24:00:00",
        "dcft submit mine.toml --gpus-per-node 4 --dry-run",
    ),
    "plan": ("dcft plan --model mine.toml --ranks 8", "dcft plan --model vit_large --ranks 8 --fit"),
    "config-reference": ("dcft config-reference > configuration.md",),
    "slurm-files": ("dcft slurm-files slurm/",),
}
