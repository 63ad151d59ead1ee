"""A finished run's model, used on other data: metrics, predictions, answers, masks, deltas.

`load_adapted(run, overrides, world)` (in `inference.load`) reads the exported model.
"""
