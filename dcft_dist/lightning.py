"""Former name of `dcft_dist.integrations.lightning`."""

from .integrations.lightning import DCFTCallback

__all__ = ["DCFTCallback"]
