"""The method: score every weight, select the fundamental set, penalise its weights during fine-tuning.

The three calls are `score_importance`, `select_fundamental` and `attach_penalty`. Import them from `dcft_dist`.
"""
