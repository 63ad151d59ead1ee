"""The user's word for code: which code a configuration names, and whether the user has said that it may run.

Whoever starts a training has written its configuration, or has read it. A run's folder may come from somebody else. So the
commands that look at a run or a configuration (`predict`, `evaluate`, `delta`, `inspect`, `plan`) import only well-known
builders by themselves. Everything else needs the user's word, which is one of these:

- the option `--trust-code`;
- the user's settings, `~/.config/dcft_dist/trusted.toml`: `callables = ["my_models.make"]`, `roots = ["/home/me/code"]`;
- a training of the user with the same code, which `dcft train` records in `~/.local/state/dcft_dist/code.jsonl`, outside of
  the run's folder;
- an answer to a question, if a person sits at a terminal. Nobody else is ever asked.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
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

# Import paths that run no code of a configuration's author, by key: patterns of the whole path. None of them has a further
# dot, since a module shows what it imports: `monai.transforms.inverse.torch.os.system`.
_KNOWN = {
    "model.build": r"timm\.create_model|transformers\.Auto[A-Za-z]+|monai\.networks\.nets\.[A-Z]\w*|open_clip\.create_model",
    "task.loss": r"torch\.nn\.functional\.[a-z]\w*|monai\.losses\.[A-Z]\w*",
    "task.metrics": r"torchmetrics\.functional\.[a-z]\w*",
    "data.transform": r"monai\.transforms\.Rand[A-Za-z]+|torchvision\.transforms\.(Random[A-Za-z]+|ColorJitter)",
    "model.args": r"torch\.nn\.[A-Z]\w*",
    "optimizer.build": r"(torch\.optim|pytorch_optimizer)\.[A-Z]\w*",
}

# Words in the names of arguments by which a well-known builder may run code, or read a pickle, a file or an address.
_DANGEROUS = {"trust", "remote", "code", "checkpoint", "pretrained", "weights", "path", "file", "filename", "dir", "url"}
_DANGEROUS |= {"repo", "reader", "func", "cfg"}
_ALWAYS = ("weights_only", "load_weights_only", "use_safetensors")  # also if they are false
_PLAIN = re.compile(r"([\w+-]+(\.\w+)?)?")  # nothing, words, and names of models such as vit_base_patch16_224.mae

_OBJECT = "object:"  # marks an import path in model.args


def named_code(config: Config) -> dict[str, str]:
    """What a configuration would run beyond the well-known: `key = import path` -> path and hash of its source."""
    roots = [str(Path(root).resolve()) for root in config.import_roots]
    wanted = {f"import_roots {root}": root for root in roots}
    for key, path in _paths(config):
        if not re.fullmatch(_KNOWN.get(key, "(?!)"), path):
            wanted[f"{key} = {path}"] = _source(path, roots)
    tables = {"model.args": config.model.args, "data.transform_args": config.data.transform_args}
    tables |= {"optimizer.args": config.optimizer.args, "task.loss_args": config.task.loss_args}
    for section, arguments in tables.items():
        for name, value in _nested(arguments):
            if _needs_a_word(name, value):
                wanted[f"{section}.{name} = {value}"] = str(config.model.weights)
    return wanted


def _needs_a_word(name: str, value: Any) -> bool:
    """Whether an argument is more than a number, a switch or a plain word."""
    if isinstance(value, str) and value.startswith(_OBJECT):  # looked at as an import path
        return False
    if isinstance(value, str) and not _PLAIN.fullmatch(value):
        return True
    says_more = value is True or isinstance(value, str)
    return name in _ALWAYS or (says_more and not _DANGEROUS.isdisjoint(name.lower().split("_")))


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
    values = {said: said.partition(" = ")[2] or said.removeprefix("import_roots ") for said in wanted}
    left = [said for said, value in values.items() if not any(fnmatchcase(value, name) for name in allowed)]
    if not left or _answered(place, left):
        return
    raise TrustError(
        f"{place} names code that would run: {listing(left, 4)}. Read it first. Then say --trust-code, or list it in "
        f"{_settings()} (callables = [...], roots = [...])"
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
        if file is None and named:
            raise OSError("there is no home for it")
        for said, source in named.items():
            if file and (digest := _digest(said, source)) not in recorded:
                file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                append_line(file, {"code": digest, "name": said})
    except OSError as error:
        log.warning("the record of code cannot be written: predictions will ask for --trust-code (%s)", error)


def _paths(config: Config) -> Iterator[tuple[str, str]]:
    """(dotted key, import path) of everything that a configuration imports."""
    if config.model.build:
        yield "model.build", config.model.build
    if ":" in config.engine:
        yield "engine", config.engine
    for key in ("build", "collate", "transform"):
        if path := getattr(config.data, key):
            yield f"data.{key}", path
    if config.optimizer.build:
        yield "optimizer.build", config.optimizer.build
    if config.task.loss and not config.task.loss_by_name:
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
            for file in (module / "__init__.py", Path(f"{module}.py")):  # as Python does
                if file.is_file():
                    return f"{file.resolve()} {hashlib.sha256(file.read_bytes()).hexdigest()}"
    return "not found"


def _digest(said: str, source: str) -> str:
    return hashlib.sha256(json.dumps([said, source]).encode()).hexdigest()


def _record() -> Path | None:
    return _own_file("XDG_STATE_HOME", ".local/state", "code.jsonl")


def _settings() -> Path | None:
    return _own_file("XDG_CONFIG_HOME", ".config", "trusted.toml")


def _own_file(variable: str, folder: str, name: str) -> Path | None:
    """A file of the user's; None if the user has no home, as in some containers."""
    try:
        return Path(os.environ.get(variable) or Path.home() / folder) / "dcft_dist" / name
    except RuntimeError:
        return None


def _recorded() -> set[str]:
    file = _record()
    try:
        return {str(row["code"]) for row in objects_in(file, "code")} if file else set()
    except OSError:
        return set()


def _allowed() -> list[str]:
    """What the user's settings allow: import paths (`my_models.*` allows all in a module), and folders of code.

    Raises:
        ConfigError: the file is not TOML, or its keys are not lists.
    """
    file = _settings()
    if file is None or not file.is_file():
        return []
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: not a TOML file: {error}") from error
    lists = content.get("callables", []), content.get("roots", [])
    if content.keys() - {"callables", "roots"} or not all(isinstance(names, list) for names in lists):
        raise ConfigError(f"{file}: it has two lists, such as callables = ['my_models.make'] and roots = ['/home/me/code']")
    return [*map(str, lists[0]), *(str(Path(root).expanduser().resolve()) for root in lists[1])]


def _answered(place: Path | str, wanted: list[str]) -> bool:
    """Asks the person at the terminal, if there is one."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if not (alone and sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(f"{place} names code that would run:", *wanted, sep="\n  ", file=sys.stderr)
    print("Do you trust it? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
