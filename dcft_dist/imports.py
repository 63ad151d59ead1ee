"""Objects by import path, from installed packages and from folders that the user names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import ConfigError, did_you_mean


def find_object(path: str, roots: Sequence[str], what: str) -> Any:
    """What `package.module.name` is; `package.module:name` is the same.

    Args:
        roots: folders that are searched before the installed packages.
        what: the key of the configuration, for errors.

    Raises:
        ConfigError: there is no such module or name, a root is no folder, or the module fails while it is imported.
    """
    for root in reversed(roots):
        if not Path(root).is_dir():
            raise ConfigError(f"import_roots: {root} is no folder")
        if (place := str(Path(root).resolve())) not in sys.path:
            sys.path.insert(0, place)
    parts = path.replace(":", ".").split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ConfigError(f"{what}: {path!r} is no import path, such as timm.create_model")
    for cut in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:cut])
        try:
            found: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
                continue  # no such module: maybe its last part is a name in the one above
            raise ConfigError(f"{what}: {name} needs the package {error.name}, which is not installed") from error
        except Exception as error:
            raise ConfigError(f"{what}: {name} fails while it is imported: {type(error).__name__}: {error}") from error
        for part in parts[cut:]:
            if not hasattr(found, part):
                raise ConfigError(f"{what}: {name} has no {part}{did_you_mean(part, dir(found))}")
            found, name = getattr(found, part), f"{name}.{part}"
        return found
    raise ConfigError(f"{what}: there is no module {parts[0]}: install it, or name its folder in import_roots")


def find_function(path: str, roots: Sequence[str], what: str) -> Any:
    """As `find_object`, for something that can be called.

    Raises:
        ConfigError: see `find_object`; or the object cannot be called.
    """
    function = find_object(path, roots, what)
    if not callable(function):
        raise ConfigError(f"{what}: {path} is no function")
    return function
