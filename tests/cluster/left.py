"""What runs on the cluster have left: their output, summaries, progress and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dcft_dist.config.toml import load_config
from dcft_dist.models.build import build_model
from dcft_dist.weights.model_state import load_checkpoint


def output(folder: Path) -> str:
    return "\n".join(f"--- {f.name}\n{f.read_text()}" for f in sorted(folder.glob("*.out")))


def summary(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name / "summary.json").read_text())
    return found


def last(folder: Path, name: str) -> Path:
    return max((folder / name / "checkpoints").glob("step_*"))


def bits(folder: Path, name: str) -> dict[str, list[bytes]]:
    """Every tensor of the last checkpoint, in pieces, to the bit: weights and optimizer state."""
    found: dict[str, list[bytes]] = {}
    for file in last(folder, name).glob("*.safetensors"):
        for key, value in load_file(file).items():
            found.setdefault(key, []).append(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return {key: sorted(pieces) for key, pieces in found.items()}


def differing(one: dict[str, list[bytes]], other: dict[str, list[bytes]]) -> list[str]:
    return sorted(key for key in one | other if one.get(key) != other.get(key))


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The weights after the last step, read into one process."""
    config = load_config(str(folder / name / "config.toml"))
    with torch.random.fork_rng():
        model = build_model(config, 21).module
    load_checkpoint(last(folder, name), model)
    return model.state_dict()


def step_of(folder: Path, name: str, starts: int = 0) -> int:
    """The step of a run; `starts`: 0 unless it has so many, and the last of them has made the step."""
    try:
        progress = json.loads((folder / "runs" / name / "progress.json").read_text())
        times = [json.loads(row)["time"] for row in (folder / "runs" / name / "attempts.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return 0
    if starts and (len(times) != starts or progress["updated"] < times[-1]):
        return 0
    return int(progress["step"]) if progress["phase"] == "train" else 0


def phase_of(run: Path) -> str:
    file = run / "progress.json"
    return str(json.loads(file.read_text())["phase"]) if file.exists() else ""
