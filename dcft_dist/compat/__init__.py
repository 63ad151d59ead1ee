"""Access to private parts of torch, DeepSpeed and transformers, and the versions that were tested.

Other sub-packages use private parts of these libraries only through here: `from ..compat.pytorch import persistent_buffers`.
"""
