"""DCFT inside the training loops of other libraries.

`trainer.add_callback(DCFTCallback(trainer, head="classifier"))`, from `integrations.transformers` or
`integrations.lightning`.
"""
