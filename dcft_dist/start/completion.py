"""Completion of commands, options and configuration keys in a shell: `dcft completion`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Literal, get_args, get_origin

from ..config.schema import sections
from ..config.section import Section
from ..errors import ConfigError


def completion(parser: argparse.ArgumentParser, takes_keys: Iterable[argparse.ArgumentParser], shell: str) -> str:
    """The script that completes the command line in a shell.

    Args:
        parser: of the command line. It gets the configuration keys as options, so it can only be used for this.
        takes_keys: parsers of the commands that take configuration keys.
        shell: `bash` or `zsh`.

    Raises:
        ConfigError: the package shtab is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise ConfigError('completion needs the package shtab: pip install "dcft_dist[completion]"') from error
    for command in takes_keys:
        for key, choices in _keys():
            with suppress(argparse.ArgumentError):  # an option of the command itself
                command.add_argument(f"--{key}", choices=choices)
    found: str = shtab.complete(parser, shell=shell)
    return found


def _keys() -> Iterable[tuple[str, list[str] | None]]:
    """(dotted key, its choices) of the configuration."""
    for prefix, section in sections():
        for name, field in section.model_fields.items():
            if not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
                yield f"{prefix}.{name}" if prefix else name, _choices(field.annotation)


def _choices(kind: Any) -> list[str] | None:
    if kind is bool:
        return ["true", "false"]
    return list(map(str, get_args(kind))) if get_origin(kind) is Literal else None
