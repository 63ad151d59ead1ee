"""Former name of `dcft_dist.integrations.transformers`."""

from .integrations.transformers import DCFTCallback

__all__ = ["DCFTCallback"]
