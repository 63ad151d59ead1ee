"""The method itself: score every weight, select one global fundamental set, penalise it.

`score_importance`, `select_fundamental` and `attach_penalty` are the three calls; all are importable from `dcft_dist`.
"""
