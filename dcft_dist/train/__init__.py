"""One run, phase by phase: warm up the head, score, select, fine-tune, test.

`train(config)` (in `train.run`) is what every rank of `dcft train` calls.
"""
