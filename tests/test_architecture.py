"""Imports form a DAG of layers; the package raises and never asserts; no pickle is loaded; nothing is left behind."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from dcft_dist import config, reference

PACKAGE = Path(config.__file__).parent
ROOT = PACKAGE.parent

# Lowest first; a module may import from lower layers only, and from its own layer where no cycle arises.
LAYERS = [
    ["errors", "meet"],
    ["schema", "bits", "files", "names", "packages", "meta"],
    ["config", "reference"],
    ["engines.private"],
    ["collectives", "kernels"],
    ["world"],
    ["engines.base"],
    ["engines.replicated", "engines.fsdp2", "engines.fsdp1", "engines.zero"],
    ["engines"],
    ["engines.wrap"],
    ["fundamental", "multiplier", "obs", "weights"],
    ["importance"],
    ["threshold"],
    ["selection", "penalty_checks", "warmup", "score_file"],
    ["in_force"],
    ["penalty"],
    ["factor"],
    ["__init__"],
    ["recipe"],
    ["hf", "lightning"],
    ["splits", "imports", "stored", "objective", "dicom", "seeded", "preprocessing"],
    ["variation", "loading", "language", "objectives", "segmentation"],
    ["own_parts"],
    ["kinds"],
    ["mri", "data", "rows"],
    ["pretrained", "images", "volumes", "own_data"],
    ["own_model", "labelled_volumes"],
    ["tasks", "models", "inspection", "feed"],
    ["life"],
    ["run_folder"],
    ["checkpoint", "evaluate", "measure", "controls", "displacement", "run_dir", "optim"],
    ["planned"],
    ["plan"],
    ["removal", "methods", "prior"],
    ["provenance", "job"],
    ["find_set", "training", "finish", "adapted", "delta"],
    ["answers", "masks"],
    ["head"],
    ["trainer"],
    ["pictures"],
    ["report"],
    ["card"],
    ["bootstrap", "study"],
    ["study_folder"],
    ["study_table", "compare"],
    ["study_report"],
    ["start"],
    ["cluster"],
    ["cli"],
]


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(file: Path) -> set[str]:
    """Modules of the package that a file imports, late imports included."""
    found = set()
    package = file.relative_to(PACKAGE).parent.parts
    modules = {module_name(f) for f in PACKAGE.rglob("*.py")}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                found.add(whole if whole in modules else ".".join(base) or "__init__")
    return found - {module_name(file)}


def test_imports_form_layers() -> None:
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    files = {module_name(f): f for f in PACKAGE.rglob("*.py")}
    assert set(files) == set(level), "every module has its layer"
    wrong = [f"{name} imports {used}" for name, file in files.items() for used in imports(file) if level[used] > level[name]]
    assert wrong == []
    graph = {name: imports(file) for name, file in files.items()}
    while graph:  # take away what imports nothing that is left, until nothing is left
        free = [name for name, used in graph.items() if not used & graph.keys()]
        assert free, f"a cycle among {sorted(graph)}"
        for name in free:
            del graph[name]


def test_the_package_raises_and_never_asserts() -> None:
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text())
        asserts = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
        assert asserts == [], file
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                call = ast.unparse(node.func)
                assert call not in ("pickle.load", "pickle.loads", "yaml.load"), (file, node.lineno)
                safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
                assert call != "torch.load" or safe, (file, node.lineno)


def test_private_parts_of_other_libraries_are_in_one_place() -> None:
    """Attributes with a leading underscore are the package's own, except in `engines.private`."""
    trees = {module_name(f): ast.parse(f.read_text()) for f in PACKAGE.rglob("*.py")}
    others = [node for name, tree in trees.items() if name != "engines.private" for node in ast.walk(tree)]
    attributes = [n for n in others if isinstance(n, ast.Attribute) and n.attr.startswith("_") and not n.attr.endswith("__")]
    own = {n.attr for n in attributes if isinstance(n.ctx, ast.Store) and ast.unparse(n.value) in ("self", "cls")}
    own |= {n.name for n in others if isinstance(n, ast.FunctionDef)}
    own |= {"_exit"}  # of os
    assert {ast.unparse(n) for n in attributes if n.attr not in own} == set()


@pytest.mark.parametrize("page", ["configuration"])
def test_generated_pages_are_current(page: str) -> None:
    assert (ROOT / "docs" / f"{page}.md").read_text() == reference.reference(), (
        "run: dcft config-reference > docs/configuration.md"
    )


def test_light_modules_import_without_torch() -> None:
    """A configuration is checked in a moment."""
    modules = "dcft_dist.config, dcft_dist.cluster, dcft_dist.meet, dcft_dist.run_folder, dcft_dist.tasks, dcft_dist.life"
    code = f"import sys, dcft_dist, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
