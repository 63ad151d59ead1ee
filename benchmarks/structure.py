"""The structure of the package in figures: modules, rooms, arrows between them, floors, longest file and function.

python benchmarks/structure.py [FOLDER]     FOLDER: another checkout, to compare with

An arrow is an import from one module, or room, to another; late imports count. A room stands one floor above the highest
room that it imports. Before there were rooms, each module stood for itself. Docstrings do not count as lines of a function.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

Graph = dict[str, set[str]]


def modules(package: Path) -> dict[str, Path]:
    """Dotted name -> file of every module of a package."""

    def name_of(file: Path) -> str:
        parts = file.relative_to(package).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)

    return {name_of(file): file for file in sorted(package.rglob("*.py"))}


def imports(package: Path) -> Graph:
    """Module -> modules of the package that it imports, late imports included."""
    files = modules(package)
    graph: Graph = {}
    for name, file in files.items():
        folder, used = file.relative_to(package).parent.parts, set[str]()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = [*folder[: len(folder) - node.level + 1], *(node.module.split(".") if node.module else [])]
                for alias in node.names:
                    whole = ".".join([*base, alias.name])
                    used.add(whole if whole in files else ".".join(base) or "__init__")
        graph[name] = used - {name}
    return graph


def room_of(module: str) -> str:
    """The room of a module, or the module itself if it stands beside the rooms."""
    return module.split(".")[0]


def between_rooms(graph: Graph) -> Graph:
    rooms: Graph = {room_of(name): set() for name in graph}
    for name, used in graph.items():
        rooms[room_of(name)] |= {room_of(other) for other in used} - {room_of(name)}
    return rooms


def floors(graph: Graph) -> list[list[str]]:
    """The floors of a graph, lowest first.

    Raises:
        ValueError: some nodes import each other in a circle.
    """
    above, left = [], dict(graph)
    while left:
        floor = sorted(name for name, used in left.items() if not used & left.keys())
        if not floor:
            raise ValueError(f"a circle among {sorted(left)}")
        above.append(floor)
        left = {name: used for name, used in left.items() if name not in floor}
    return above


def functions(file: Path) -> list[tuple[int, str]]:
    """(lines without the docstring, name) of every function and method of a file."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
    return [(_span(node) - (_span(node.body[0]) if ast.get_docstring(node) else 0), node.name) for node in nodes]


def docstring_lines(file: Path) -> int:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, kinds)]
    return sum(_span(node.body[0]) for node in nodes if ast.get_docstring(node))


def _span(node: ast.stmt) -> int:
    return (node.end_lineno or 0) - node.lineno + 1


def main() -> None:
    root = Path(sys.argv[1] if sys.argv[1:] else Path(__file__).parents[1])
    package = root / "dcft_dist"
    files, graph = modules(package), imports(package)
    rooms = between_rooms(graph)
    try:
        height = str(len(floors(rooms)))
    except ValueError:
        height = "none: they import each other in a circle"
    lengths = sorted((len(file.read_text().splitlines()), str(file.relative_to(root))) for file in files.values())
    longest = max(
        (lines, f"{name} in {file.relative_to(root)}") for file in files.values() for lines, name in functions(file)
    )
    pages = [page for page in (root / "docs").rglob("*.md") if "studies" not in page.parts]
    rows = {
        "modules": len(files),
        "files beside each other in dcft_dist/": len(list(package.glob("*.py"))),
        "rooms": len({name for name in rooms if (package / name).is_dir()}),
        "arrows between modules": sum(map(len, graph.values())),
        "arrows between rooms": sum(map(len, rooms.values())),
        "floors of modules": len(floors(graph)),
        "floors of rooms": height,
        "longest file": "{} lines, {}".format(*lengths[-1]),
        "longest function": "{} lines, {}".format(*longest),
        "lines of the package": sum(lines for lines, _ in lengths),
        "of these, lines of docstrings": sum(map(docstring_lines, files.values())),
        "pages and lines of docs": f"{len(pages)}, {sum(len(page.read_text().splitlines()) for page in pages):,}",
    }
    for name, value in rows.items():
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
