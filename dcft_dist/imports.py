"""Finds objects by import path, in installed packages and in folders that the user names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import ConfigError, did_you_mean

# What may stand in a key, for the refusal of what cannot be meant.
_MAY = {
    "model.build": "a function or class that returns a torch module, such as timm.create_model, or your own",
    "task.loss": "a function (outputs, labels) -> losses [size], such as one of torch.nn.functional, or your own",
    "task.metrics": "functions (records, labels) -> {name: number}, such as your own",
    "data.build": "your function without arguments that returns rows",
    "data.collate": "your function that turns a list of inputs into a dictionary of tensors",
    "data.transform": "a class or function of MONAI, or your own",
    "model.args": "an object such as torch.nn.SiLU",
    "optimizer.build": "a class such as torch.optim.NAdam, or your own subclass of torch.optim.Optimizer",
    "engine": "your subclass of dcft_dist.engines.base.Engine",
}


def find_object(path: str, roots: Sequence[str], what: str) -> Any:
    """Imports the object that an import path names.

    Args:
        path: `package.module.name` or `package.module:name`.
        roots: folders that are searched before the installed packages.
        what: the key of the configuration, for error messages.

    Raises:
        ConfigError: the module or the name does not exist, a root is not a folder, or the module fails during its import.
    """
    for root in reversed(roots):
        if not Path(root).is_dir():
            raise ConfigError(f"import_roots: {root} is not a folder")
        if (folder := str(Path(root).resolve())) not in sys.path:
            sys.path.insert(0, folder)
    parts = path.replace(":", ".").split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ConfigError(f"{what}: {path!r} is not an import path such as timm.create_model")
    own = any((Path(root) / f"{parts[0]}.py").is_file() or (Path(root) / parts[0]).is_dir() for root in roots)
    if parts[0] in sys.stdlib_module_names and not own:
        may = _MAY.get(what, "the path of your own function, in a folder of import_roots")
        raise ConfigError(f"{what}: {path} belongs to Python itself, and is none of what may stand here: {may}")
    for cut in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:cut])
        try:
            target: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
                continue  # no such module: its last part may be a name in the module above
            raise ConfigError(f"{what}: {name} needs the package {error.name}, which is not installed") from error
        except Exception as error:
            raise ConfigError(f"{what}: {name} fails during its import: {type(error).__name__}: {error}") from error
        for part in parts[cut:]:
            if not hasattr(target, part):
                raise ConfigError(f"{what}: {name} has no {part}{did_you_mean(part, dir(target))}")
            target, name = getattr(target, part), f"{name}.{part}"
        return target
    raise ConfigError(f"{what}: no module {parts[0]}: install it, or add its folder to import_roots")


def find_function(path: str, roots: Sequence[str], what: str) -> Any:
    """Imports the function, class or other callable that an import path names.

    Args:
        path: `package.module.name` or `package.module:name`.
        roots: folders that are searched before the installed packages.
        what: the key of the configuration, for error messages.

    Raises:
        ConfigError: as for `find_object`, or the object cannot be called.
    """
    function = find_object(path, roots, what)
    if not callable(function):
        raise ConfigError(f"{what}: {path} is not a function")
    return function
