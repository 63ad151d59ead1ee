"""Uses a finished run's model on other data: metrics, predictions, answers, masks and deltas.

`load_adapted(run, overrides, world)` (in `inference.load`) reads the exported model into a `TaskModel`.
"""
