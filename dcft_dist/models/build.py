"""Builds the pre-trained model of a run: a packaged one, or the user's."""

from __future__ import annotations

from pathlib import Path

import torch

from ..config.schema import Config
from ..data.processors import make_processor
from ..errors import ConfigError
from ..imports import find_object
from ..packages import dinov2_file, local_weights, minilm_folder
from ..weights.weight_files import missing_weights_advice
from .custom import custom_model
from .packaged import dinov2_small, minilm
from .pretrained import HEAD, Classifier, ExportPart, Pretrained, find_blocks


def build_model(config: Config, num_outputs: int) -> Pretrained:
    """The pre-trained model with its head, not wrapped. A new head is drawn from the seed.

    Args:
        config: configuration of the run.
        num_outputs: number of outputs of the head.

    Raises:
        DataError: the package with the weights is not installed.
        ConfigError: `model.num_layers` exceeds the model's layers; for `model.build` see `custom_model`.
        CheckpointError: the weights do not fit the model that `model.build` makes.
    """
    if config.model.name == "own":
        return custom_model(config, num_outputs, make_processor(config))
    backbone, features = {"minilm": minilm, "dinov2_small": dinov2_small}[config.model.name](config)
    layers = config.model.num_layers
    if layers is not None:
        if layers > len(backbone.encoder.layer):
            raise ConfigError(f"model.num_layers: the model has {len(backbone.encoder.layer)} layers, not {layers}")
        backbone.encoder.layer = backbone.encoder.layer[:layers]
        backbone.config.num_hidden_layers = layers
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        module = Classifier(backbone.float(), features, backbone.config.hidden_size, num_outputs)
    return Pretrained(
        module=module,
        head=(HEAD,),
        blocks=find_blocks(module),
        processor=make_processor(config),
        parts={"backbone.": ExportPart("."), f"{HEAD}.": ExportPart(HEAD)},
        describe=backbone.config.save_pretrained,
    )


def check_model(config: Config) -> None:
    """Checks that the model's code and weights exist, without building it.

    Args:
        config: configuration of the run.

    Raises:
        DataError: the package with the weights is not installed.
        ConfigError: `model.build` cannot be imported, or `model.weights` does not exist.
    """
    if config.model.name == "own":
        find_object(str(config.model.build), config.import_roots, "model.build")
        if (place := local_weights(config.model.weights)) and not Path(place).exists():
            raise ConfigError(f"model.weights: {missing_weights_advice(place)}")
    else:
        {"minilm": minilm_folder, "dinov2_small": dinov2_file}[config.model.name]()
