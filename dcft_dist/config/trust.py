"""The user's word for code: which code a configuration names, and whether the user has said that it may run.

Whoever starts a training has written its configuration, or has read it. A run's folder may come from somebody else. So the
commands that look at a run or a configuration (`predict`, `evaluate`, `delta`, `inspect`, `plan`) import only well-known
builders by themselves. Everything else needs the user's word, which is one of these:

- the option `--trust-code`;
- the user's settings, `~/.config/dcft_dist/trusted.toml`: `callables = ["my_models.make"]`;
- a training of the user with the same code, which `dcft train` records in `~/.local/state/dcft_dist/code.jsonl`, outside of
  the run's folder;
- an answer to a question, if a person sits at a terminal. Nobody else is ever asked.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import tomllib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import ConfigError, TrustError, listing
from ..files import append_line, objects_in
from .schema import Config

log = logging.getLogger(__name__)

# Import paths that run no code of a configuration's author, by key.
_KNOWN = {
    "model.build": ("timm.create_model", "transformers.Auto*", "monai.networks.nets.*", "open_clip.create_model"),
    "task.loss": ("torch.nn.functional.*", "monai.losses.*"),
    "task.metrics": ("torchmetrics.functional.*",),
    "data.transform": ("monai.transforms.*", "torchvision.transforms.*"),
    "model.args": ("torch.nn.*",),
}

# Arguments that make a well-known builder run code, or read a pickle.
_RUNS_CODE = ("trust_remote_code", "code_revision", "checkpoint_path")

_OBJECT = "object:"  # marks an import path in model.args


def named_code(config: Config) -> dict[str, str]:
    """What a configuration would run beyond the well-known: `key = import path` -> path and hash of its source."""
    roots = [str(Path(root).resolve()) for root in config.import_roots]
    wanted = {f"import_roots {root}": root for root in roots}
    for key, path in _paths(config):
        if not any(fnmatchcase(path, known) for known in _KNOWN.get(key, ())):
            wanted[f"{key} = {path}"] = _source(path, roots)
    for name, value in _nested(config.model.args):
        if name in _RUNS_CODE and value:
            wanted[f"model.args.{name} = {value}"] = str(config.model.weights)
    return wanted


def require_trust(config: Config, place: Path | str, given: bool = False, typed: Sequence[str] = ()) -> None:
    """Checks that the user has given their word for all code that a configuration names.

    Args:
        config: the configuration.
        place: where it comes from, for the message.
        given: whether the user has said `--trust-code`.
        typed: words of the command line. What the user types there needs no further word.

    Raises:
        TrustError: the user has not; the message lists the code.
    """
    keys = tuple(word.partition("=")[0].removeprefix("--") for word in typed if word.startswith("--"))
    named = named_code(config)
    if given:
        _record_all(named)
        return
    recorded = _recorded() if named else set()
    wanted = [said for said, source in named.items() if not _is_of(said, keys) and _digest(said, source) not in recorded]
    if not wanted:
        return
    allowed = _allowed()
    left = [said for said in wanted if not any(fnmatchcase(said.partition(" = ")[2] or said, name) for name in allowed)]
    if all(said.startswith("import_roots ") for said in left) and len(left) < len(wanted):
        return  # the folders of callables that are allowed by name
    if not left or _answered(place, left):
        return
    raise TrustError(
        f"{place} names code that would run: {listing(left, 4)}. Read it first. Then say --trust-code, or list it in "
        f"{_settings()} (callables = [...])"
    )


def remember(config: Config) -> None:
    """Records that the user runs this code, so that they need not say so again. Nothing happens if it cannot be written."""
    _record_all(named_code(config))


def _is_of(said: str, keys: Sequence[str]) -> bool:
    """Whether an entry of `named_code` is of one of these keys, or of a part of one."""
    key = said.split(" ")[0]
    return any(key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.") for other in keys)


def _record_all(named: dict[str, str]) -> None:
    file = _record()
    try:
        recorded = _recorded() if named else set()
        for said, source in named.items():
            if (digest := _digest(said, source)) not in recorded:
                file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                append_line(file, {"code": digest, "name": said})
    except OSError as error:
        log.warning("%s cannot be written: predictions will ask for --trust-code (%s)", file, error)


def _paths(config: Config) -> Iterator[tuple[str, str]]:
    """(dotted key, import path) of everything that a configuration imports."""
    if config.model.build:
        yield "model.build", config.model.build
    if ":" in config.engine:
        yield "engine", config.engine
    for key in ("build", "collate", "transform"):
        if path := getattr(config.data, key):
            yield f"data.{key}", path
    if config.task.loss:
        yield "task.loss", config.task.loss
    for path in config.task.metrics:
        yield "task.metrics", path
    for _, value in _nested(config.model.args):
        if isinstance(value, str) and value.startswith(_OBJECT):
            yield "model.args", value.removeprefix(_OBJECT)


def _nested(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of everything in tables within tables and lists."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _nested(part, str(key))
    elif isinstance(value, list):
        for part in value:
            yield from _nested(part, name)
    else:
        yield name, value


def _source(path: str, roots: Sequence[str]) -> str:
    """Path and hash of the file that an import path leads to, found without importing anything."""
    parts = path.replace(":", ".").split(".")
    for root in (*roots, *sys.path):
        for end in range(len(parts) - 1, 0, -1):
            module = Path(root or ".", *parts[:end])
            for file in (module.with_suffix(".py"), module / "__init__.py"):
                if file.is_file():
                    return f"{file.resolve()} {hashlib.sha256(file.read_bytes()).hexdigest()}"
    return "not found"


def _digest(said: str, source: str) -> str:
    return hashlib.sha256(json.dumps([said, source]).encode()).hexdigest()


def _record() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "dcft_dist" / "code.jsonl"


def _recorded() -> set[str]:
    try:
        return {str(row["code"]) for row in objects_in(_record(), "code")}
    except OSError:
        return set()


def _settings() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "dcft_dist" / "trusted.toml"


def _allowed() -> list[str]:
    """Import paths that the user's settings allow; `my_models.*` allows all in a module.

    Raises:
        ConfigError: the file is not TOML, or has no list `callables`.
    """
    file = _settings()
    if not file.is_file():
        return []
    try:
        names = tomllib.loads(file.read_text(encoding="utf-8"))["callables"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{file}: it must have a list, such as callables = ['my_models.make'] ({error})") from error
    if not isinstance(names, list):
        raise ConfigError(f"{file}: callables must be a list")
    return [str(name) for name in names]


def _answered(place: Path | str, wanted: list[str]) -> bool:
    """Asks the person at the terminal, if there is one."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if not (alone and sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(f"{place} names code that would run:", *wanted, sep="\n  ", file=sys.stderr)
    print("Do you trust it? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
