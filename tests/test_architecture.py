"""Rooms import downwards only; the package raises and never asserts; no pickle is loaded; nothing is too long."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dcft_dist
from benchmarks.structure import floors, functions, imports, modules, room_of
from dcft_dist.config.reference import reference

PACKAGE = Path(dcft_dist.__file__).parent
ROOT = PACKAGE.parent

# Room -> rooms it may import, late imports included. Modules beside the rooms that have no imports of their own among
# them (errors, files, imports, packages, screen, seeds, tensor_file) may be imported by all.
COMMON = {"errors", "files", "imports", "packages", "screen", "seeds", "tensor_file"}
MAY_IMPORT: dict[str, str] = {
    "compat": "",
    "config": "",
    "distributed": "compat",
    "engines": "compat distributed",
    "method": "compat distributed engines",
    "controls": "distributed engines method",
    "integrations": "compat distributed engines method",
    "data": "config",
    "objectives": "config data distributed",
    "weights": "compat distributed engines",
    "models": "compat config data engines weights",
    "runs": "config distributed",
    "reports": "config method objectives",
    "train": "compat config controls data distributed engines method models objectives reports runs weights",
    "inference": "compat config data distributed engines method models objectives runs train weights",
    "planning": "compat config engines method models objectives train weights",
    "studies": "config data distributed reports runs train",
    "cluster": "config runs train",
    "start": "config data",
}
# Modules beside the rooms that look into them: the public names, the command line, and former names.
ABOVE = {"__init__", "cli", "hf", "lightning", "meet"}

MOST_LINES, MOST_LINES_OF_A_FUNCTION = 500, 60


FILES, GRAPH = modules(PACKAGE), imports(PACKAGE)


def test_rooms_import_only_what_the_table_allows() -> None:
    assert {room_of(name) for name in FILES} == MAY_IMPORT.keys() | COMMON | ABOVE, "every room has a row"
    wrong, used = [], set()
    for name in FILES:
        room = room_of(name)
        allowed = {room} | COMMON | set(MAY_IMPORT.get(room, "").split())
        for target in {room_of(module) for module in GRAPH[name]}:
            if room in COMMON and target not in COMMON:
                wrong.append(f"{name} imports {target}: what all rooms may import looks into none")
            elif room in MAY_IMPORT and target not in allowed:
                wrong.append(f"{name} imports {target}")
            used.add((room, target))
    assert wrong == []
    idle = [f"{room} -> {other}" for room, row in MAY_IMPORT.items() for other in row.split() if (room, other) not in used]
    assert idle == [], "the table allows what no module needs"


def test_there_is_no_circle() -> None:
    floors({room: set(row.split()) for room, row in MAY_IMPORT.items()})
    floors(GRAPH)
    with pytest.raises(ValueError, match="a circle among"):
        floors(GRAPH | {"errors": {"cli"}})


def test_every_room_says_what_it_is_for() -> None:
    """And shows a call; it imports nothing, so that light modules stay light."""
    for room in MAY_IMPORT:
        tree = ast.parse(FILES[room].read_text())
        text = ast.get_docstring(tree) or ""
        assert 60 < len(text) < 500 and "`" in text, room
        assert not [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level], room


def test_files_and_functions_are_short() -> None:
    for file in [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        assert len(file.read_text().splitlines()) <= MOST_LINES, file
        long = [f"{name} has {lines} lines" for lines, name in functions(file) if lines > MOST_LINES_OF_A_FUNCTION]
        assert long == [], file


def test_the_package_raises_and_never_asserts() -> None:
    for file in FILES.values():
        tree = ast.parse(file.read_text())
        asserts = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
        assert asserts == [], file
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                call = ast.unparse(node.func)
                assert call not in ("pickle.load", "pickle.loads", "yaml.load"), (file, node.lineno)
                safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
                assert call != "torch.load" or safe, (file, node.lineno)


def test_private_parts_of_other_libraries_are_in_one_room() -> None:
    """Attributes with a leading underscore are the package's own, except in `compat`."""
    trees = {name: ast.parse(file.read_text()) for name, file in FILES.items()}
    others = [node for name, tree in trees.items() if room_of(name) != "compat" for node in ast.walk(tree)]
    attributes = [n for n in others if isinstance(n, ast.Attribute) and n.attr.startswith("_") and not n.attr.endswith("__")]
    own = {n.attr for n in attributes if isinstance(n.ctx, ast.Store) and ast.unparse(n.value) in ("self", "cls")}
    own |= {n.name for n in others if isinstance(n, ast.FunctionDef)}
    own |= {"_exit"}  # of os
    assert {ast.unparse(n) for n in attributes if n.attr not in own} == set()


def test_generated_pages_are_current() -> None:
    page = ROOT / "docs" / "configuration.md"
    assert page.read_text() == reference(), "run: dcft config-reference > docs/configuration.md"


def test_light_modules_import_without_torch() -> None:
    """A configuration is checked in a moment."""
    light = "config.toml, cluster.submit, meet, runs.folder, runs.status, data.tasks"
    modules = ", ".join(f"dcft_dist.{name.strip()}" for name in light.split(","))
    code = f"import sys, dcft_dist, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
