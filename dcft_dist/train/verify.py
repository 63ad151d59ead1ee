"""Checks everything in the folder of a run: checksums, form, and whether files belong together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ..config.toml import load_config
from ..errors import RunError, line_of
from ..files import files_below, read_json, read_lines
from ..method.fundamental_set import FundamentalSet
from ..runs.folder import RunFolder, identity
from ..tensor_file import is_altered
from ..weights.checkpoint import read_state

_DAMAGED = object()


def verify_run(path: Path) -> tuple[list[str], list[str]]:
    """Checks the files of a run. It changes nothing.

    Args:
        path: the run's directory, of a run that is not going on.

    Returns:
        (what is whole, what is not): a line for each file or checkpoint.

    Raises:
        RunError: there is no run.
    """
    folder, whole, broken = RunFolder(path), list[str](), list[str]()
    if not (path / "config.toml").exists() and not folder.has_results():
        raise RunError(f"no run in {path}")
    for name, check in _checks(folder):
        try:
            said = check()
        except Exception as error:  # the type depends on what is odd in the file
            broken.append(line_of(error) if str(path) in str(error) else f"{path / name}: {line_of(error)}")
        else:
            whole.append(f"{name}{said or ''}")
    broken += [f"{path / name} is missing, or is not the file that the run wrote" for name in folder.altered()]
    return whole, broken


def _checks(folder: RunFolder) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """(name, check) of each file. A check raises an error, or returns something to add to the name."""
    yield "config.toml", lambda: _nothing(load_config(folder.path / "config.toml"))
    for file in (folder.progress, folder.facts, folder.removal, folder.summary, folder.estimate):
        if file.exists():
            yield file.name, lambda file=file: _nothing(read_json(file))  # type: ignore[misc]
    for file in sorted((folder.path / "errors").glob("*.json")):
        yield f"errors/{file.name}", lambda file=file: _nothing(read_json(file))  # type: ignore[misc]
    for file in (folder.path / "attempts.jsonl", folder.metrics, *sorted(folder.contents.glob("*.jsonl"))):
        if file.exists():
            yield file.relative_to(folder.path).as_posix(), lambda file=file: _lines(file)  # type: ignore[misc]
    tensors = [folder.head, folder.scores, *(f for f in files_below(folder.model) if f.suffix == ".safetensors")]
    for file in tensors if folder.model.is_dir() else tensors[:2]:
        if file.exists() and file.name != folder.fundamental.name:
            yield file.relative_to(folder.path).as_posix(), lambda file=file: _tensors(file)  # type: ignore[misc]
    for file in (folder.fundamental, folder.model / folder.fundamental.name):
        if file.exists():
            yield file.relative_to(folder.path).as_posix(), lambda file=file: _nothing(FundamentalSet.load(file))  # type: ignore[misc]
    for kind in ("step", "best"):
        for step in folder.steps(kind):
            place = folder.checkpoint(step, kind)
            yield f"checkpoints/{place.name}", lambda place=place: _checkpoint(folder, place)  # type: ignore[misc]


def _nothing(_: object) -> None:
    return None


def _lines(file: Path) -> str:
    rows = read_lines(file, damaged=_DAMAGED)
    if number := sum(row is _DAMAGED for row in rows):
        raise ValueError(f"{number} of {len(rows)} lines are damaged")
    return f" ({len(rows)} lines)"


def _tensors(file: Path) -> None:
    if is_altered(file):
        raise ValueError("it was altered after it was written")


def _checkpoint(folder: RunFolder, place: Path) -> None:
    read_state(place, identity(load_config(folder.path / "config.toml")))
