"""How much time the penalty adds to a training step of a transformer encoder, in one process.

    python benchmarks/penalty.py --layers 9 --width 512 --samples 16 --length 256

The arms take turns, step by step; each has a separate model and AdamW. `public practice`: a hook on each gradient clones it
and multiplies `gradient[mask]` for a mask of booleans. `mask bytes a weight`: bytes that an arm stores, divided by the
eligible weights. The cost of a step grows with the number of samples, but that of the penalty does not. The percentage
therefore depends on the number of samples.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from side_by_side import REPEATS, parser, show
from torch import Tensor, nn
from torch.nn import functional

from dcft_dist import FundamentalSet, attach_penalty

FACTOR, FRACTION = 0.1, 0.1
ARMS = {
    "plain": None,
    "gradient, before": {"level": "gradient", "where": "before"},
    "gradient, after": {"level": "gradient", "where": "after"},
    "update": {"level": "update"},
    "public practice": None,
}


class Net(nn.Module):
    """A transformer encoder with ten outputs."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


def eligible(model: nn.Module) -> dict[str, Tensor]:
    """The weight matrices of the model without those of its head, by name."""
    return {n: p for n, p in model.named_parameters() if p.ndim == 2 and not n.startswith("head")}


def mask_of(weight: Tensor, seed: int) -> Tensor:
    """A random mask of booleans in the shape of the weight; a tenth of it is True."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(weight.shape, generator=generator) < FRACTION


def multiply_where(mask: Tensor) -> Callable[[Tensor], Tensor]:
    """A gradient hook that multiplies the gradient by the factor where the mask is True."""

    def hook(gradient: Tensor) -> Tensor:
        scaled = gradient.clone()
        scaled[mask] *= FACTOR
        return scaled

    return hook


class Arm:
    """A model in training, with or without a penalty. `name`: a key of `ARMS`."""

    def __init__(self, name: str, layers: int, width: int, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.model = Net(layers, width).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.device, self.dtype, self.mask_bytes, self.seconds = device, dtype, 0, list[float]()
        weights = eligible(self.model)
        masks = {n: mask_of(p, i) for i, (n, p) in enumerate(weights.items())}
        if name == "public practice":
            for n, p in weights.items():
                p.register_hook(multiply_where(masks[n].to(device)))
            self.mask_bytes = sum(m.numel() for m in masks.values())
        elif (options := ARMS[name]) is not None:
            chosen: Any = FundamentalSet.from_masks(masks)
            self.penalty = attach_penalty(self.model, chosen, FACTOR, optimizer=self.optimizer, **options)  # type: ignore[arg-type]
            self.mask_bytes = self.penalty.mask_bytes

    def step(self, x: Tensor, y: Tensor) -> None:
        """One training step; its time goes into `seconds`."""
        begin = self._now()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = functional.cross_entropy(self.model(x).float(), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(self._now() - begin)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--layers", type=int, default=9)
    arguments.add_argument("--width", type=int, default=512)
    arguments.add_argument("--samples", type=int, default=16)
    arguments.add_argument("--length", type=int, default=256)
    arguments.add_argument("--threads", type=int, default=2)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)  # no warning that AdamW cancels the gradient penalty: only the cost counts here
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    arms = {name: Arm(name, options.layers, options.width, device, dtype) for name in ARMS}
    x = torch.randn(options.samples, options.length, options.width, device=device)
    y = torch.randint(0, 10, (options.samples,), device=device)
    for _ in range(1 + 2 * REPEATS):  # the first step is to warm up
        for arm in arms.values():
            arm.step(x, y)
    number = sum(p.numel() for p in eligible(arms["plain"].model).values())
    plain = arms["plain"].seconds[1:]
    rows: list[dict[str, Any]] = []
    for name, arm in arms.items():
        extra = statistics.median(a - b for a, b in zip(arm.seconds[1:], plain, strict=True))
        rows.append(
            {
                "penalty": name,
                "eligible weights": number,
                "tokens": options.samples * options.length,
                "s a step": statistics.median(arm.seconds[1:]),
                "added %": 100 * extra / statistics.median(plain),
                "added ns a weight": 1e9 * extra / number,
                "mask bytes a weight": arm.mask_bytes / number,
            }
        )
    show(rows, options.json, 2 * REPEATS)


if __name__ == "__main__":
    main()
