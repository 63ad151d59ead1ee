"""One run, phase by phase: warm up the head, score, select, fine-tune, test.

Every rank of `dcft train` calls `train(config)` (in `train.run`).
"""
