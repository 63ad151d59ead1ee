"""Studies compare arms over seeds and settings: tuned on validation data, tested once, reported with intervals.

`compare(file, folder, world, share, wait_s)` (in `studies.runner`) runs a study.
"""
