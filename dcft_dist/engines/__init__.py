"""How a model is sharded: one file for each engine, behind two views of the same weights.

`find_engine(model)` (in `engines.find`) returns the engine. `engine.leaves()` has the unsharded gradients and
`engine.shards()` this rank's part of each weight. Everything else in the package is written against these two views.
"""
