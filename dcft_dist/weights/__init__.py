"""Reads pre-trained weights into sharded models, and writes and reads exports and checkpoints.

`save_weights(model, folder)` and `load_weights(model, folder)` (in `weights.export`) work under every engine.
"""
