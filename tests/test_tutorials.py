"""The tutorials run, from their own text: files are written, commands are carried out, and print what they should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from .browser import problems

PAGES = sorted((Path(__file__).parent.parent / "docs/tutorials").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_tutorial_runs(page: Path, tmp_path: Path) -> None:
    said = ""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    paths = f"{PAGES[0].parents[2]}{os.pathsep}{tmp_path}"  # for tests.leave
    env = os.environ | {"PATH": programs, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    for kind, text in blocks:
        if kind == "bash":
            text = re.sub(r"^(torchrun .*?)(\w+\.py)", r"\1-m tests.leave \2", text, flags=re.MULTILINE)
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


def test_the_notebook_runs_and_completes_names(tmp_path: Path) -> None:
    """Each cell; what does not depend on the processor is printed as the file has it. Tab shows the public names."""
    notebook = nbformat.read(PAGES[0].parent / "notebook.ipynb", 4)
    kept = [str(cell.get("outputs")) for cell in notebook.cells]
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}})
    with client.setup_kernel():
        for number, cell in enumerate(notebook.cells):
            client.execute_cell(cell, number)
        asked = client.kc.complete("dcft_dist.s", 11)
        reply = client.wait_for_reply(asked)["content"]
    assert {"save_scores", "score_importance", "select_fundamental"} <= {text.split(".")[-1] for text in reply["matches"]}
    found = [str(cell.get("outputs")) for cell in notebook.cells]
    words = ("select_fundamental", "fraction: 'float' = 0.1", "1,024 of 10,240", "Penalty(factor 0.1 on the update", "'1.0'")
    for word in words:
        assert any(word in text for text in kept) and any(word in text for text in found), word
