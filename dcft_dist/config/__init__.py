"""The configuration of a run: a typed schema, one module for each part, and TOML files that fill it.

`load_config("icd.toml", ["--optimizer.lr", "1e-4"])` (in `config.toml`) reads a file, applies overrides and checks both.
"""
