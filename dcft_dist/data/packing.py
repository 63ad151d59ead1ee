"""Packing: several texts in one row, so that little of a batch is padding. Each text sees only itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IGNORED = -100  # label of a token that is not learned


def rows_of(lengths: Sequence[int], width: int | None) -> list[list[int]]:
    """Divides texts into rows: the longest first, each into the first row with room for it (first fit decreasing).

    Args:
        lengths: number of tokens of each text.
        width: tokens in a row, at least as many as in the longest text; None: one row for all.

    Returns:
        The texts of each row, by their place.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, free in enumerate(room) if free >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(sum(lengths) if width is None else width)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def packed(ids: Sequence[Sequence[int]], given: Sequence[int], width: int | None, pad_id: int) -> dict[str, Tensor]:
    """Puts texts into rows.

    The positions begin anew with each text. From them, and because there is no mask, models of transformers know where a
    text begins.

    Args:
        ids: token ids of each text.
        given: number of tokens of each text that are not learned, at its beginning.
        width: see `rows_of`. Rows are as long as the longest of them.
        pad_id: token id that fills shorter rows.

    Returns:
        `input_ids` and `position_ids` [rows, tokens]; `labels` [rows, tokens, 2]: the id of each token that is learned, else
        `IGNORED`, and the number of such tokens in its text.
    """
    rows = rows_of([len(text) for text in ids], width)
    longest = max(sum(len(ids[i]) for i in row) for row in rows)
    tokens = torch.full((len(rows), longest), pad_id)
    positions = torch.arange(longest).repeat(len(rows), 1)
    labels = torch.tensor([IGNORED, 1]).repeat(len(rows), longest, 1)
    for r, row in enumerate(rows):
        begin = 0
        for i in row:
            text, first = torch.tensor(ids[i]), max(given[i], 1)  # no token predicts the first one
            end, learned = begin + len(text), begin + first
            tokens[r, begin:end] = text
            labels[r, learned:end, 0], labels[r, begin:end, 1] = text[first:], len(text) - first
            positions[r, end:] -= len(text)  # begins anew after each text, also where the padding begins
            begin = end
    return {"input_ids": tokens, "position_ids": positions, "labels": labels}
