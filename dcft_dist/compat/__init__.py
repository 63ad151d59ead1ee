"""Private parts of torch, DeepSpeed and transformers, and the versions they were tested on.

Other rooms reach into another library only through here: `from ..compat.pytorch import persistent_buffers`.
"""
