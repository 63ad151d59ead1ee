"""A hundred thousand random inputs, with the checks of `test_fuzz.py`: `tests/run.sh --faults`. DCFT_CASES: their number."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from . import inputs
from .test_fuzz import _inside

__all__ = ["_inside"]

CASES = int(os.environ.get("DCFT_CASES", "100000"))

# Kind -> (inputs, check, needs a folder, share of all cases). Reports of runs take longest.
KINDS: dict[str, tuple[Any, Any, bool, float]] = {
    "configurations": (inputs.overrides, inputs.check_configuration, False, 0.2),
    "toml": (inputs.toml_bytes, inputs.check_toml, True, 0.2),
    "tables": (inputs.tables, inputs.check_table, True, 0.2),
    "packs": (inputs.packs, inputs.check_pack, True, 0.1),
    "models": (inputs.model_files, inputs.check_model, True, 0.2),
    "runs": (inputs.run_files(), inputs.check_run, True, 0.02),
    "commands": (inputs.command_lines, inputs.check_command, False, 0.03),
    "jobs": (inputs.sizes, lambda size: inputs.check_job(size, {}), False, 0.03),
    "sites": (inputs.sites, lambda site: inputs.check_job({"nodes": 1}, site), False, 0.02),
}


@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", KINDS)
def test_many(kind: str, tmp_path: Path) -> None:
    strategy, check, needs_folder, share = KINDS[kind]
    done = 0

    @settings(max_examples=round(CASES * share), deadline=None, database=None, suppress_health_check=[*HealthCheck])
    @given(strategy)
    def many(value: Any) -> None:
        nonlocal done
        done += 1
        check(value, tmp_path) if needs_folder else check(value)

    many()
    print(f"{kind}: {done} cases")
