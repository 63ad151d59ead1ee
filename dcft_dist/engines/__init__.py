"""How a model is sharded over ranks: one file for each engine, and two views of the weights that every engine offers.

`find_engine(model)` (in `engines.find`) returns the engine. `engine.leaves()` lists the tensors that receive unsharded
gradients. `engine.shards()` lists this rank's part of each weight. Scoring, selection and penalty use only these two views.
"""
