"""A run on disk: its folder, its lock, its starts and failures, and its progress.

`RunFolder.of(config)` (in `runs.folder`) knows the paths. Only functions that ranks call together import torch.
"""
