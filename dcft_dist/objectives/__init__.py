"""Losses and metrics of each kind of task.

`make_objective(config, facts)` (in `objectives.make`) returns the objective of a configuration.
"""
