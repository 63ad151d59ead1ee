"""The base of the studies in these tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..own import tiny_encoder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`smoke.toml` with a small encoder in the place of MiniLM: a cell takes about a second."""
    folder = tmp_path_factory.mktemp("base")
    model = (
        f'build = "transformers.AutoModel"\nargs = {{add_pooling_layer = false}}\nfeatures = "mean"\nweights = "{folder}"'
    )
    text = (ROOT / "configs/smoke.toml").read_text().replace("num_layers = 2", model)
    tiny_encoder(folder)
    (folder / "base.toml").write_text(text)
    return folder / "base.toml"
