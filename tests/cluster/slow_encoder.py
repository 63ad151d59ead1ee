"""A model for `model.build` that costs little and takes its time, so that jobs can be disturbed at a chosen step."""

from __future__ import annotations

import time

from transformers import AutoModel, BertModel

FORWARD_S = 0.1  # asleep: other ranks have the cores meanwhile


def encoder(folder: str) -> BertModel:
    """The small BERT in a folder."""
    model: BertModel = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    model.register_forward_pre_hook(lambda *_: time.sleep(FORWARD_S))
    return model
