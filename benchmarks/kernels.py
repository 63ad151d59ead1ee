"""Times the two products of the penalty on one GPU: by Triton kernels, by torch on unpacked bits, and by a dense mask.

    python benchmarks/kernels.py --weights 500_000_000

`scale`: gradient <- m * gradient, as at the gradient level. `shorten`: new <- old + m * (new - old), as at the update level.
`GB/s`: bytes that have to move (float32 weights read and written, and one bit for each), divided by the time. `of a copy`:
the time, divided by that of a plain copy of as many bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from side_by_side import gpu_peak_bytes, parser, seconds, show

from dcft_dist.method import multipliers
from dcft_dist.method.multipliers import Multipliers, Plane, on


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--weights", type=int, default=500_000_000)
    options = arguments.parse_args()
    number, gpu = options.weights, torch.device("cuda")
    octets = np.random.default_rng(0).integers(0, 256, -(-number // 8), dtype=np.uint8)
    ours, plane = Multipliers(0.1, 1.0, 1.0), Plane(on(gpu, octets), "factor", "rest")
    mask = torch.from_numpy(np.unpackbits(octets, count=number, bitorder="little")).bool().to(gpu)
    old, new = (torch.randn(number, device=gpu) for _ in range(2))

    def unfused(call: Callable[[], Any]) -> Callable[[], Any]:
        """The call without the Triton kernels."""

        def run() -> None:
            fused, multipliers.is_fused = multipliers.is_fused, lambda *_: False  # type: ignore[assignment]
            try:
                call()
            finally:
                multipliers.is_fused = fused

        return run

    def scale() -> None:
        ours.multiply([(new, plane, new, None)])

    def shorten() -> None:
        ours.multiply([(new, plane, new, old)])

    def public_practice() -> None:
        scaled = new.clone()
        scaled[mask] *= 0.1

    moved = number * (8 + 1 / 8)  # bytes of one tensor read and written, and of the bits
    cases: list[tuple[str, float, Callable[[], Any]]] = [
        ("copy", 8.0 * number, lambda: new.copy_(old)),
        ("scale, Triton", moved, scale),
        ("scale, torch", moved, unfused(scale)),
        ("scale, clone and boolean index", moved, public_practice),
        ("shorten, Triton", moved + 4 * number, shorten),
        ("shorten, torch", moved + 4 * number, unfused(shorten)),
    ]
    rows: list[dict[str, Any]] = []
    for name, size, call in cases:
        call()
        _, extra = gpu_peak_bytes(call)
        s = seconds(call)
        rows.append({"product": name, "weights": number, "ms": 1e3 * s, "GB/s": size / s / 1e9, "extra MiB": extra / 2**20})
    for row, (_, size, _) in zip(rows, cases, strict=True):
        row["of a copy"] = row["ms"] / rows[0]["ms"] * cases[0][1] / size
    show(rows, options.json)


if __name__ == "__main__":
    main()
