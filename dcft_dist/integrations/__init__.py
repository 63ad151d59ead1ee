"""Callbacks that run DCFT inside the training loops of transformers and Lightning.

`trainer.add_callback(DCFTCallback(trainer, head="classifier"))`, from `integrations.transformers` or
`integrations.lightning`.
"""
