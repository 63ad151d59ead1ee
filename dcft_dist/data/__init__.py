"""From files to batches: tasks, readers, splits, and the processors that turn examples into tensors.

`load_task(config)` (in `data.tasks`) returns the three splits of a task.
"""
