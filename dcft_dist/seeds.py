"""Seeds derived from words, and functions that seed random generators."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*words: object, bits: int = 32) -> int:
    """Derives a seed from words: the first bits of the SHA-256 of the words, joined by colons.

    Args:
        words: any objects; their `str` counts.
        bits: number of bits of the seed, at most 64.
    """
    digest = hashlib.sha256(":".join(map(str, words)).encode()).digest()
    num_bytes = -(-bits // 8)
    return int.from_bytes(digest[:num_bytes], "little") >> (8 * num_bytes - bits)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the generators of Python, numpy and torch (CPU) for a block, and restores their states at its end.

    Args:
        seed: seed of all three generators.
    """
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def seed_step(seed: int, step: int, micro_batch: int) -> None:
    """Seeds torch for one micro-batch. Dropout then depends only on the step, and checkpoints need no generator states.

    Args:
        seed: seed of the run.
        step: index of the optimizer step.
        micro_batch: index of the micro-batch within the step, counted over all ranks. With micro-batches of equal size,
            dropout then does not depend on the number of ranks.
    """
    torch.manual_seed(seed_of(seed, step, 0, micro_batch, bits=63))
