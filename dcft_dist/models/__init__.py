"""Pre-trained models with a head for the task: packaged models, and models that the user's configuration builds.

`build_model(config, num_outputs)` (in `models.build`) returns a `Pretrained`.
"""
