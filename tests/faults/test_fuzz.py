"""Random input, some hundred cases a kind: only errors of this package, no hang, and no file outside the test's folder.

`test_long_fuzz.py` makes a hundred thousand of them (`tests/run.sh --faults`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from . import inputs

CASES = 60  # of each kind

quick = settings(
    max_examples=CASES,
    deadline=20_000,
    database=None,
    suppress_health_check=[*HealthCheck],
    print_blob=False,
    derandomize=True,
)


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything that is written lies in the test's folder."""
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    before = set(os.listdir(tmp_path.parent))
    yield
    assert set(os.listdir(tmp_path.parent)) <= before | {"outside"}, "a file beside the folder"
    assert not list((tmp_path / "home").rglob("*.py"))


@quick
@given(inputs.overrides)
def test_configurations(words: list[str]) -> None:
    inputs.check_configuration(words)


@quick
@given(inputs.toml_bytes)
def test_files_of_configurations(tmp_path: Path, content: bytes) -> None:
    inputs.check_toml(content, tmp_path)


@quick
@given(inputs.tables)
def test_tables(tmp_path: Path, table: tuple[str, bytes]) -> None:
    inputs.check_table(table, tmp_path)


@quick
@given(inputs.packs)
def test_packs_of_arrays(tmp_path: Path, content: Any) -> None:
    inputs.check_pack(content, tmp_path)


@quick
@given(inputs.model_files)
def test_files_of_models(tmp_path: Path, file: tuple[str, bytes]) -> None:
    inputs.check_model(file, tmp_path)


@quick
@given(inputs.run_files())
def test_files_of_runs(tmp_path: Path, file: tuple[str, bytes]) -> None:
    inputs.check_run(file, tmp_path)


@quick
@given(inputs.command_lines)
def test_command_lines(words: list[str]) -> None:
    inputs.check_command(words)


@quick
@given(inputs.sizes, inputs.sites)
def test_jobs_and_sites(size: dict[str, Any], site: dict[str, Any]) -> None:
    inputs.check_job(size, site)
