"""The Triton kernels against the torch path, by Triton's interpreter: what they compute, not how fast."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

BODY = """
import sys
sys.path.insert(0, ".")
from tests.method.kernel_cases import captured, one_tensor, selection, tables
one_tensor()
tables()
captured()
selection()
print("the same")
"""


def test_kernels_do_what_torch_does() -> None:
    """In a process of its own: Triton reads the switch when it is imported."""
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", BODY], env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout == "the same\n", done.stderr


FEW = {
    "source": "*fp32",
    "octets": "*u8",
    "target": "*fp32",
    "numel": "i32",
    "numbers": "*fp32",
    "high": "i32",
    "low": "i32",
}
MANY = dict.fromkeys(("addresses", "octets", "sizes", "block_entry", "block_first"), "*i64")
SCORES = dict.fromkeys(("addresses", "sizes", "block_entry", "block_first"), "*i64")
PACKING = SCORES | {"places": "*i64", "key": "*i64", "octets": "*u8", "counts": "*i64", "ties": "*i64"}
SAVED = {"saved_at": "*i64", "copy": "*fp32"}


@pytest.mark.parametrize(
    ("kernel", "signature", "constants"),
    [
        ("_scale", FEW, {}),
        ("_shorten", FEW, {}),
        ("_scale_many", MANY | {"numbers": "*fp32"}, {}),
        ("_save_many", MANY | SAVED, {"PACKED": True}),
        ("_save_many", MANY | SAVED, {"PACKED": False}),
        ("_shorten_many", MANY | {"numbers": "*fp32"} | SAVED, {"PACKED": True}),
        ("_shorten_many", MANY | {"numbers": "*fp32"} | SAVED, {"PACKED": False}),
        ("_count_digits", SCORES | {"num_blocks": "i32", "prefix": "*i64", "counts": "*i64"}, {"SHIFT": 21, "BITS": 11}),
        ("_count_digits", SCORES | {"num_blocks": "i32", "prefix": "*i64", "counts": "*i64"}, {"SHIFT": 0, "BITS": 10}),
        ("_pack_above", PACKING, {"LISTED": False}),
        ("_pack_above", PACKING, {"LISTED": True}),
    ],
)
def test_kernels_compile_for_gpus(kernel: str, signature: dict[str, str], constants: dict[str, int]) -> None:
    """For an H100, by Triton's own compiler, which needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dcft_dist.method import kernels

    values = constants | {"BLOCK": kernels.BLOCK}
    signature = signature | dict.fromkeys(values, "constexpr")
    source = ASTSource(getattr(kernels, kernel), signature, values)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["ptx"]
