"""Profiles chosen steps of a run (`train.profile`): a trace of each rank, its collectives, a snapshot of a GPU's memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from ..compat.pytorch import dump_memory, record_memory
from ..files import write_json
from ..runs.writer import logging_only

log = logging.getLogger(__name__)


class Profile:
    """Records from the first of the chosen steps to the last one. Files appear when that one is done."""

    def __init__(self, steps: Collection[int], folder: Path, rank: int, device: torch.device) -> None:
        """
        Args:
            steps: the steps, counted from 1; empty: nothing is recorded.
            folder: where the files go.
            rank: this rank.
            device: of this rank.
        """
        self._first, self._last = (min(steps), max(steps)) if steps else (0, 0)
        self._folder, self._rank, self._on_gpu = folder, rank, device.type == "cuda"
        self._profiler: Any = None
        self._began = 0.0

    def before(self, step: int) -> None:
        """Begins to record if it is time. Call it before each step."""
        if step != self._first:
            return
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if self._on_gpu else []
        self._profiler = torch.profiler.profile(activities=kinds, profile_memory=True)
        if self._on_gpu:
            record_memory(True)
        self._profiler.start()
        self._began = time.perf_counter()

    def after(self, step: int) -> None:
        """Writes the files if it is time. Call it after each step."""
        if step != self._last or self._profiler is None:
            return
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        self._profiler.stop()
        name = f"steps_{self._first}_to_{self._last}_rank_{self._rank}"
        with logging_only(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
            collectives = self._collectives()
            share = sum(collectives.values()) / seconds
            write_json(self._folder / f"{name}_collectives.json", {"seconds": seconds, "collectives": collectives})
            log.info("profile: collectives are under way %.0f %% of the time, partly beside the computation", 100 * share)
            if self._on_gpu:
                dump_memory(str(self._folder / f"{name}_memory.pickle"))
            log.info("profile: %s; open the traces in https://ui.perfetto.dev", self._folder)
        if self._on_gpu:
            record_memory(False)
        self._profiler = None

    def _collectives(self) -> dict[str, float]:
        """Seconds of each kind of collective, such as `nccl:reduce_scatter`: on a GPU those of its kernels."""
        found = {event.key: event for event in self._profiler.key_averages() if event.key.startswith(("nccl:", "gloo:"))}
        times = {key: event.device_time_total if self._on_gpu else event.cpu_time_total for key, event in found.items()}
        return {key: time / 1e6 for key, time in sorted(times.items())}
