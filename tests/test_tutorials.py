"""The tutorials run, from their own text: files are written, commands are carried out, and print what they should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .browser import problems

PAGES = sorted((Path(__file__).parent.parent / "docs/tutorials").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_tutorial_runs(page: Path, tmp_path: Path) -> None:
    said = ""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": programs, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    for kind, text in blocks:
        if kind == "bash":
            done = subprocess.run(
                ["bash", "-e", "-c", text], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=400
            )
            assert done.returncode == 0, f"{text}{done.stdout}{done.stderr}"
            said += done.stdout + done.stderr
        elif kind == "text":
            assert all(line in said for line in text.splitlines()), f"{text}\nnot in\n{said}"
        else:
            name = re.match(r"# (\S+)\n", text)
            assert name is not None, f"{page}: a block of {kind} begins with the name of its file"
            (tmp_path / name.group(1)).write_text(text)
    assert {"bash", "text"} <= {kind for kind, _ in blocks}
    assert problems(tmp_path.rglob("report.html")) == []
