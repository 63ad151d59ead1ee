"""Weights in and out: pre-trained files into sharded models, exports, and checkpoints.

`save_weights(model, folder)` and `load_weights(model, folder)` (in `weights.export`) work under every engine.
"""
