"""Seeds that are a function of words, and blocks in which every generator starts from one."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*words: object, bits: int = 32) -> int:
    """A seed of `bits` bits (at most 64) that is a function of the words: the first bits of their SHA-256."""
    digest = hashlib.sha256(":".join(map(str, words)).encode()).digest()
    num_bytes = -(-bits // 8)
    return int.from_bytes(digest[:num_bytes], "little") >> (8 * num_bytes - bits)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A block in which Python's, numpy's and torch's generators start from the seed; it leaves them as it found them."""
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
    """Seeds torch for one micro-batch, so that dropout is a function of the step and no generator's state is saved.

    Args:
        micro_batch: index of the step's micro-batch, counted over all ranks. With micro-batches of equal size the numbers
            then do not depend on the number of ranks.
    """
    torch.manual_seed(seed_of(seed, step, 0, micro_batch, bits=63))
