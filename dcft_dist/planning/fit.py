"""Which settings fit N GPUs of M GiB (`dcft plan --fit`): the largest micro-batch with each way to save memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .memory import GIB, Forecast, forecast
from .planned_models import Request, is_configuration

# What saves memory of a GPU, in the order of what it costs.
_WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"activation_checkpointing": "selective"},
    {"activation_checkpointing": "blocks"},
    {"activation_checkpointing": "blocks", "activations_on_host": True},
    {"activation_checkpointing": "blocks", "offload": True},
    {"activation_checkpointing": "blocks", "activations_on_host": True, "offload": True},
)

MOST = 64  # largest micro-batch that is tried, if nothing says how many samples a step has


def fitting(request: Request, plan: Callable[[Request], Forecast] = forecast) -> list[Forecast]:
    """Forecasts of the largest micro-batch that fits with each way to save memory.

    A step of a configuration, or of several micro-batches, keeps its number of samples: the micro-batch divides them, and a
    smaller one makes more of them. Otherwise powers of two up to `MOST` are tried. Ways that cost more come later, and only
    if the micro-batch is larger with them. Host memory is used only if nothing fits without it.

    Args:
        request: its micro-batch times its accumulation are the samples of a rank in a step.
        plan: makes one forecast.

    Returns:
        At least one forecast. If nothing fits, the one that needs the least memory.
    """
    samples = request.micro_batch * request.accumulation
    if is_configuration(request.model) or request.accumulation > 1:
        sizes = [n for n in range(1, samples + 1) if samples % n == 0]
    else:
        sizes, samples = [2**i for i in range(MOST.bit_length())], 0
    found, fits_without_host = list[Forecast](), False
    for way in _WAYS:
        host = "offload" in way or "activations_on_host" in way
        if (host and fits_without_host) or (way.get("offload") and request.engine == "zero3"):
            break
        largest = _largest(replace(request, **{"activation_checkpointing": "none", **way}), sizes, samples, plan)
        fits_without_host |= largest.fits and not host
        if not found or largest.fits > found[-1].fits or _size(largest) > _size(found[-1]) or not largest.fits:
            found.append(largest)
    fits = [f for f in found if f.fits]
    return fits or [min(found, key=lambda f: f.peak)]


def _size(found: Forecast) -> int:
    return found.request.micro_batch if found.fits else 0


def _largest(request: Request, sizes: list[int], samples: int, plan: Callable[[Request], Forecast]) -> Forecast:
    """The largest of the sizes that fits, or 1. Memory grows evenly with it, so two forecasts tell where to look.

    `samples`: of a step; 0: one micro-batch is a step.
    """

    def of(size: int) -> Forecast:
        return plan(replace(request, micro_batch=size, accumulation=samples // size if samples else 1))

    known = {1: of(1)}
    if not known[1].fits or len(sizes) < 2:
        return known[1]
    known[sizes[1]] = of(sizes[1])
    each = max((known[sizes[1]].peak - known[1].peak) / (sizes[1] - 1), 1)
    left = [size for size in sizes if known[1].peak + (size - 1) * each <= request.memory_gib * GIB]
    while (size := left.pop()) > 1:
        known[size] = known.get(size) or of(size)
        if known[size].fits:
            break
    return known[size]


def fitting_table(found: list[Forecast]) -> str:
    """What `dcft plan --fit` prints.

    Args:
        found: what `fitting` has returned.
    """
    request = found[0].request
    lines = [
        f"{request.model}: {found[0].weights:,} weights; {request.engine} on {request.ranks} ranks of "
        f"{request.memory_gib:g} GiB",
        "",
        f"{'checkpointing':<16}{'on the host':<24}{'micro-batch':>12}{'micro-batches':>15}{'GiB':>9}{'GiB of host':>13}",
    ]
    for f in found:
        r = f.request
        host = ["activations"] * r.activations_on_host + ["weights"] * r.offload
        row = f"{r.activation_checkpointing:<16}{', '.join(host) or '-':<24}{r.micro_batch:>12}{r.accumulation:>15}"
        lines.append(f"{row}{f.peak / GIB:>9.2f}{f.host_peak / GIB:>13.2f}")
    if not found[0].fits:
        return "\n".join([*lines, "", "nothing fits, and this needs the least: take more GPUs, or shorter samples"])
    first = found[0].request
    words = f"--train.micro_batch {first.micro_batch} --train.activation_checkpointing {first.activation_checkpointing}"
    words += " --train.activations_on_host true" * first.activations_on_host + " --sharding.offload true" * first.offload
    advice = "the first line computes nothing more often than it must" if len(found) > 1 else "use it"
    return "\n".join([*lines, "", f"{advice}: {words}"])
