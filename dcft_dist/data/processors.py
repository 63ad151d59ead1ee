"""Chooses the processor that turns the examples of a configuration into tensors."""

from __future__ import annotations

from ..config.schema import IMAGE_TASKS, Config
from ..errors import ConfigError
from ..packages import local_weights, minilm_folder
from .batches import Processor
from .collate import CollateProcessor
from .images import ImageProcessor, UserImageProcessor
from .text import AnswerProcessor, TextProcessor
from .volumes import LabelledVolumeProcessor, VolumeProcessor


def make_processor(config: Config) -> Processor:
    """Builds the processor of a configuration.

    Returns:
        Tasks with grey images of their own: `ImageProcessor`. `task.kind = "segmentation"`: `VolumeProcessor`. The user's
        other data: `LabelledVolumeProcessor`, `CollateProcessor` or `UserImageProcessor` for `data.modality` volume, own or
        image. Otherwise texts: `AnswerProcessor` for `causal_lm`, else `TextProcessor`.

    Raises:
        ConfigError: the model has no tokenizer, or a key of `[data]` cannot be used.
    """
    if config.task.name in IMAGE_TASKS:
        return ImageProcessor(config.model.image_size)
    if config.task.kind == "segmentation":
        return VolumeProcessor(config)
    if config.task.name == "own" and config.data.modality == "volume":
        return LabelledVolumeProcessor(config)
    if config.task.name == "own" and config.data.modality == "own":
        return CollateProcessor(config)
    if config.task.name == "own" and config.data.modality == "image":
        return UserImageProcessor(config)
    from transformers import AutoTokenizer

    folder = minilm_folder() if config.model.name == "minilm" else local_weights(config.model.weights)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.weights: no tokenizer in {folder}: {error}") from error
    if config.task.kind == "causal_lm":
        data, tokens = config.data, config.task.max_tokens
        return AnswerProcessor(tokenizer, tokens, data.template, data.chat, data.system, data.packing, config.packs_one_row)
    return TextProcessor(tokenizer, config.task.max_tokens)
