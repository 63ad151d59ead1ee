"""Configurations as TOML files, with dotted overrides from the command line.

A file may extend another one with `extends = "base.toml"` (in the same folder, or shipped). Keys of the file replace keys of
its base, and overrides replace both. An error lists all problems at once, each with its dotted key.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ..errors import ConfigError, did_you_mean, line_of
from .schema import LOCAL_PATHS, Config, sections
from .section import DEPTH

# Keys of packaged tasks that mean nothing for the user's own data, and what to use there.
_SMALLER = ": it limits packaged tasks. Make the table or folder smaller"
_INSTEAD = {f"task.{split}_per_class": _SMALLER for split in ("train", "validation", "test")}
_INSTEAD["task.sample_seed"] = " (`resample` of a study sets it): use data.folds, or `folds` in a study"


def load_config(path: str | Path, overrides: Sequence[str] = (), without: Sequence[str] = ()) -> Config:
    """Reads a TOML file, applies overrides and checks the result.

    Args:
        path: a file, or the name of a configuration shipped with the package (`icd.toml`).
        overrides: command-line words, `["--optimizer.lr", "1e-4"]` or `["--optimizer.lr=1e-4"]`. A value is read as TOML;
            if it is not TOML, it is a string.
        without: dotted keys of the file to ignore.

    Raises:
        ConfigError: the file does not exist or is not TOML, or keys or values are wrong. The message lists all of them.
    """
    raw = _read(find_config(path))
    if "arms" in raw:
        raise ConfigError(f"{path} is a study: use dcft compare {path}")
    if any(len(key.split(".")) > DEPTH for key, _ in _pairs(overrides)):
        raise ConfigError(f"{path}: a key has more than {DEPTH} parts")
    for section, _, last in (key.rpartition(".") for key in without):
        raw.get(section, {}).pop(last, None)
    problems = []
    for key, value in _pairs(overrides):
        target: Any = raw
        *parents, last = key.split(".")
        for part in parents:
            target = target.setdefault(part, {}) if isinstance(target, dict) else None
        if isinstance(target, dict):
            target[last] = _value(value)
        else:
            problems.append(f"--{key}: {parents[-1]} is not a section")
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        # Where a field accepts several types there is an error for each. The pattern of an import path would say little.
        details = error.errors()
        choices = {_key(detail) for detail in details if detail["type"] == "literal_error"}
        problems += [_explain(d) for d in details if d["type"] != "string_pattern_mismatch" or _key(d) not in choices]
    if not problems and config.task.name == "own":
        problems = [
            f"--{key} has no effect on your own data{_INSTEAD[key]}" for key, _ in _pairs(overrides) if key in _INSTEAD
        ]
    if problems:
        raise ConfigError(f"{path}: " + "; ".join(problems))
    return config


def find_config(path: str | Path) -> Path:
    """Path of a configuration file.

    Args:
        path: a file, or the name of a configuration shipped with the package (`icd.toml`).

    Raises:
        ConfigError: neither exists. The message names the most similar shipped configuration, and all of them.
    """
    package = Path(__file__).parent.parent
    for candidate in (Path(path), package / "configs" / path, package.parent / "configs" / path):
        if _is_file(candidate):
            return candidate
    shipped = sorted(f.name for d in (package / "configs", package.parent / "configs") for f in d.glob("*.toml"))
    here = sorted(f.name for f in Path().glob("*.toml") if f.name != "pyproject.toml")
    if hint := did_you_mean(str(path), here):
        raise ConfigError(f"no configuration file {path}{hint}")
    raise ConfigError(
        f"no configuration file {path}{did_you_mean(str(path), shipped)}; the package ships {', '.join(shipped)}"
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or has a null character
        return False


def _read(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also an integer with thousands of digits
        raise ConfigError(f"{path}: not a TOML file: {line_of(error)}") from error
    base = raw.pop("extends", None)
    if base is None:
        return raw
    beside = path.parent / str(base)
    parent = beside if _is_file(beside) else find_config(str(base))
    if parent.resolve() in (*extending, path.resolve()):
        raise ConfigError(f"{path}: extends itself through {base}")
    return _merged(_read(parent, (*extending, path.resolve())), raw)


def _merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = {k: _merged(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v for k, v in top.items()}
    return base | merged


def _pairs(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    words = iter(overrides)
    for word in words:
        if not word.startswith("--") or len(word) < 3:
            raise ConfigError(f"an override looks like --optimizer.lr 1e-4, not {word!r}")
        key, equals, value = word[2:].partition("=")
        if not equals and (value := next(words, "--")).startswith("--"):
            raise ConfigError(f"--{key} has no value")
        yield key, value


def _value(text: str) -> Any:
    try:
        found = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return found["value"] if len(found) == 1 else text  # several lines may be several keys


def _key(detail: Any) -> str:
    """Dotted key of an error, without the type that pydantic adds where a field accepts several."""
    tried_types = ("constrained-float", "constrained-str", "float", "literal[")
    return ".".join(str(part) for part in detail["loc"] if not str(part).startswith(tried_types))


def _explain(detail: Any) -> str:
    path = _key(detail)
    if detail["type"] == "extra_forbidden":
        section: type[BaseModel] = Config
        for part in detail["loc"][:-1]:
            if isinstance(part, str):  # not the position in a list of tables
                annotation: Any = section.model_fields[part].annotation
                section = get_args(annotation)[0] if get_args(annotation) else annotation
        word = str(detail["loc"][-1])
        nested = [repr(f"{prefix}.{word}") for prefix, part in sections() if prefix and word in part.model_fields]
        if section is Config and nested:
            return f"{path}: unknown key (did you mean {' or '.join(nested)}?)"
        return f"{path}: unknown key{did_you_mean(word, section.model_fields)}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "literal_error":
        expected = [word.strip(" '") for word in detail["ctx"]["expected"].replace(" or ", ",").split(",")]
        message += did_you_mean(str(detail["input"]), expected)
    return (
        f"{path}: {message} (got {detail['input']!r})"
        if path and detail["type"] != "missing"
        else (f"{path}: {message}" if path else message)
    )


def to_toml(config: Config) -> str:
    """The whole configuration as TOML, without keys that are absent (None)."""
    data = config.model_dump(exclude_none=True)
    lines = [f"{key} = {as_toml(value)}" for key, value in data.items() if not isinstance(value, dict)]
    for section, values in data.items():
        if isinstance(values, dict):
            lines += ["", f"[{section}]", *(f"{key} = {as_toml(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def as_toml(value: Any) -> str:
    """A value as TOML: numbers, texts and lists as in JSON, a table inline."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_toml(k)} = {as_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # nan, inf, -inf
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def differences(before: str, after: str) -> dict[str, str]:
    """Compares two resolved configurations.

    A configuration from an older version may lack newer keys. Such a key counts as having its default value.

    Args:
        before: the older configuration, as TOML text.
        after: the newer configuration, as TOML text.

    Returns:
        Dotted key -> message `KEY was OLD and is NEW`, for each key that differs.
    """
    defaults = to_toml(Config(name="defaults"))
    old, new = (_resolved(defaults) | _resolved(text) for text in (before, after))
    changed = [key for key in old | new if _text(old.get(key)) != _text(new.get(key))]  # NaN equals NaN
    return {key: f"{key} was {old.get(key)} and is {new.get(key)}" for key in changed}


def _text(value: Any) -> str:
    return json.dumps(value, default=str)  # a file of a stranger may have dates


def resolved_keys(config: Config) -> dict[str, str]:
    """Dotted key -> value as JSON, of the whole configuration without `LOCAL_PATHS`."""
    flat = flat_keys(config.model_dump(), depth=1)
    return {key: json.dumps(value) for key, value in flat.items() if key not in LOCAL_PATHS}


def flat_keys(nested: dict[str, Any], depth: int | None = None, prefix: str = "") -> dict[str, Any]:
    """Flattens nested tables to dotted key -> value.

    Args:
        nested: tables within tables.
        depth: number of levels below the first to flatten; deeper tables stay values. None: all.
        prefix: text before every key.
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict) and depth != 0:
            flat |= flat_keys(value, None if depth is None else depth - 1, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _resolved(text: str) -> dict[str, Any]:
    """Dotted key -> value of a resolved configuration. A table that is a value, such as `model.args`, stays a table."""
    return flat_keys(tomllib.loads(text), depth=1)
