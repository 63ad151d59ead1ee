"""How fast a run trains: samples and tokens a second, where a step's time goes, memory, and use of the GPU's peak.

Nothing here waits for a device, except `Speed.report` at a log.
"""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

PARTS = ("data", "forward", "backward", "step")


# Dense peak in 10^12 operations a second, by a part of the device's name: (bfloat16, float32). From NVIDIA's and AMD's data
# sheets; more special names first. An MI250X counts as two devices.
PEAKS = {
    "B200": (2250.0, 75.0),
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100 NVL": (835.0, 60.0),
    "H100": (989.0, 67.0),
    "GH200": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "A40": (149.7, 37.4),
    "A30": (165.0, 10.3),
    "A10": (125.0, 31.2),
    "L40S": (362.0, 91.6),
    "L40": (181.0, 90.5),
    "L4": (121.0, 30.3),
    "MI300X": (1307.0, 163.4),
    "MI250X": (191.5, 47.9),
}


def peak_of(device: torch.device, bf16: bool) -> float | None:
    """Operations a second that the device can do at most; None if its name is not in `PEAKS`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    found = next((numbers for part, numbers in PEAKS.items() if part in name), None)
    return 1e12 * found[0 if bf16 else 1] if found else None


class Clock:
    """Times the parts of steps, by the GPU's own clock if there is one."""

    def __init__(self, device: torch.device) -> None:
        """
        Args:
            device: this rank's.
        """
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def mark(self, part: str = "") -> None:
        """The time since the mark before belongs to this part; without a name, a step begins."""
        now: Any = time.perf_counter()
        if self._on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self._marks.append((part, now))

    def read(self) -> dict[str, float]:
        """Seconds by part since the last call. Waits for the device."""
        seconds: Counter[str] = Counter()
        marks, self._marks = self._marks, []
        if self._on_gpu and marks:
            marks[-1][1].synchronize()
        for (_, before), (part, now) in pairwise(marks):
            if part:
                seconds[part] += before.elapsed_time(now) / 1e3 if self._on_gpu else now - before
        return dict(seconds)


class Speed:
    """Speed of training between two logs.

    Attributes:
        clock: times the parts of each step.
    """

    def __init__(self, device: torch.device, samples: int, flops_per_sample: float, peak: float) -> None:
        """
        Args:
            device: this rank's.
            samples: in a step, over all ranks.
            flops_per_sample: operations of a forward and backward of one sample; see `flops_of`. 0: unknown.
            peak: operations a second of all devices together.
        """
        self.clock = Clock(device)
        self._device, self._samples, self._flops, self._peak = device, samples, flops_per_sample, peak
        self._steps, self._tokens = 0, 0

    def step(self, tokens: int) -> None:
        """A step is done, in which this rank has seen so many tokens, padding included."""
        self._steps += 1
        self._tokens += tokens

    def report(self, ranks: int) -> dict[str, float]:
        """What to log since the last call. Waits for the device.

        Args:
            ranks: number of ranks; each is taken to have seen as many tokens as this one.

        Returns:
            `speed/samples_per_s`, `speed/tokens_per_s` if there are tokens, `speed/mfu` (share of the peak, 0 to 1) if the
            peak is known, seconds of a step by part, and `memory/peak_gib` of this rank. A reduction that runs beside the
            backward belongs to it.
        """
        seconds, steps, tokens = self.clock.read(), self._steps, self._tokens
        self._steps = self._tokens = 0
        total = sum(seconds.values())
        found = {"memory/peak_gib": peak_memory(self._device) / 2**30}
        if not steps or not total:
            return found
        rate = self._samples * steps / total
        found |= {f"speed/{part}_s": seconds.get(part, 0.0) / steps for part in PARTS} | {"speed/samples_per_s": rate}
        if tokens:
            found["speed/tokens_per_s"] = ranks * tokens / total
        if self._flops and self._peak:
            found["speed/mfu"] = rate * self._flops / self._peak
        return found


def peak_memory(device: torch.device) -> float:
    """Most memory so far in bytes: of the GPU as torch has allocated it; without a GPU, of this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def tokens_in(batches: list[dict[str, Tensor]]) -> int:
    """Tokens of these batches, padding included; 0 if they are not texts."""
    return sum(batch["input_ids"].numel() for batch in batches if "input_ids" in batch)


def flops_of(forward: Callable[[], Any]) -> float:
    """Operations of a forward and its backward: three times those of the forward, whatever is computed again.

    So they are counted in the literature on model FLOPs utilisation (Chowdhery et al., PaLM, 2022, appendix B).

    Args:
        forward: makes one forward. It is called once, without gradients and without compilation. Collective if it is.
    """
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        forward()
    return 3.0 * float(counter.get_total_flops())
