"""Studies: arms x seeds x settings, tuned on validation data, tested once, with intervals.

`compare(file, folder, world, share, wait_s)` (in `studies.runner`) carries one out.
"""
