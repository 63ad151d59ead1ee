"""The configuration of a run: a typed schema, one module for each part, and a reader of TOML files.

`load_config("icd.toml", ["--optimizer.lr", "1e-4"])` (in `config.toml`) reads a file, applies overrides and
checks the result.
"""
