"""Ranks compare what they have in one small collective; the first that differs is named, with the first thing."""

from __future__ import annotations

import torch.distributed as dist

from dcft_dist.distributed import collectives
from dcft_dist.distributed.handshake import digest_of, require_equal, same_view
from dcft_dist.errors import MismatchError

from ..ranks import run_ranks


def compared(*facts: dict[str, str]) -> tuple[str, int, int]:
    """This rank's message, and what the comparison sent."""
    with collectives.counted() as count:
        try:
            require_equal(facts[dist.get_rank()], "configuration")
            message = ""
        except MismatchError as error:
            message = str(error).replace(f" on {__import__('socket').gethostname()}", "")
    return message, count.calls, count.num_bytes


def test_equal_facts_cost_one_number_a_rank() -> None:
    facts = {f"key {i}": "value" * 100 for i in range(100)}
    assert run_ranks(3, compared, facts, facts, facts) == [("", 1, 3 * 8)] * 3


def test_every_rank_names_the_one_that_differs() -> None:
    usual = {"optimizer.lr": "0.001", "seed": "0", "list of classes": digest_of(["a", "b"])}
    cases = {
        "rank 1 has another seed than rank 0: 1, not 0": usual | {"seed": "1", "list of classes": digest_of(["b", "a"])},
        "rank 1 has another list of classes than rank 0": usual | {"list of classes": digest_of(["b", "a"])},
        "rank 1 has another optimizer.lr than rank 0: none, not 0.001": {
            k: v for k, v in usual.items() if k != "optimizer.lr"
        },
        "rank 1 has another more than rank 0: 1, not none": usual | {"more": "1"},
    }
    for message, odd in cases.items():
        assert [text for text, *_ in run_ranks(3, compared, usual, odd, usual)] == [message] * 3
    odd_first = run_ranks(3, compared, usual | {"seed": "7"}, usual, usual)  # the majority is right, not rank 0
    assert {text for text, *_ in odd_first} == {"rank 0 has another seed than rank 1: 7, not 0"}


def views(*paths: str) -> tuple[int, int, list[int]]:
    return same_view(paths[dist.get_rank()])


def test_ranks_with_the_same_files_share_the_work() -> None:
    assert run_ranks(3, views, "/a", "/b", "/a") == [(0, 2, [0, 1, 0]), (0, 1, [0, 1, 0]), (1, 2, [0, 1, 0])]
