"""The Triton kernels against the torch path, by Triton's interpreter: what they compute, not how fast."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

BODY = """
import torch
from dcft_dist.method import kernels
from dcft_dist.method.multipliers import Multipliers

generator = torch.Generator().manual_seed(0)
for numel in (1, 7, 4096, 10_001):
    for dtype in (torch.float32, torch.bfloat16):
        for factor, rest in ((0.1, 1.0), (0.0, 0.7), (1.0, 0.0)):
            octets = torch.randint(0, 256, (-(-numel // 8),), dtype=torch.uint8, generator=generator)
            multipliers = Multipliers({"w": octets.numpy()}, torch.device("cpu"), rest, 1.0)
            multipliers.set_factor(factor)
            gradient, old, new = (torch.randn(numel, generator=generator).to(dtype) for _ in range(3))
            expected, found = torch.empty_like(gradient), torch.empty_like(gradient)
            multipliers.scale_into("w", gradient, expected)
            kernels.scale(gradient, octets, factor, rest, found)
            torch.testing.assert_close(found, expected, rtol=0 if dtype == torch.float32 else 1e-2, atol=0)
            if dtype == torch.bfloat16:
                continue  # weights are kept in float32
            expected, found = new.clone(), new.clone()
            multipliers.shorten("w", old, expected)
            kernels.shorten(old, octets, factor, rest, found)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
            bits = ((octets.unsqueeze(1) >> torch.arange(8)) & 1).view(-1)[:numel].bool()
            for value, cells in ((factor, bits), (rest, ~bits)):
                if value in (0.0, 1.0):  # exact at both ends
                    assert torch.equal(found[cells], (old if value == 0.0 else new)[cells])
print("the same")
"""


def test_kernels_do_what_torch_does() -> None:
    """In a process of its own: Triton reads the switch when it is imported."""
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", BODY], env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout == "the same\n", done.stderr


@pytest.mark.parametrize("kernel", ["_scale", "_shorten"])
def test_kernels_compile_for_gpus(kernel: str) -> None:
    """For an H100, by Triton's own compiler, which needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dcft_dist.method import kernels

    signature = {"source": "*fp32", "octets": "*u8", "target": "*fp32", "numel": "i32", "factor": "fp32", "rest": "fp32"}
    source = ASTSource(getattr(kernels, kernel), signature | {"BLOCK": "constexpr"}, {"BLOCK": kernels.BLOCK})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert ".target sm_90" in compiled.asm["ptx"] and compiled.asm["cubin"]
