"""Writes the schema of the configuration as a Markdown page: docs/configuration.md."""

from __future__ import annotations

import json
from typing import Any, get_args

from pydantic.fields import FieldInfo

from .schema import is_section, sections


def reference() -> str:
    """The schema as a Markdown page, a table for each section: key, values, default, meaning."""
    lines = [
        "# Configuration",
        "",
        "Generated from the schema by `dcft config-reference > docs/configuration.md`. You can set any key on the command",
        "line: `dcft train configs/icd.toml --optimizer.lr 1e-4 --penalty.factor 0.2`. A file can extend another one",
        'with `extends = "icd.toml"`. Unknown keys and values out of range are errors; one message lists all of them.',
    ]
    for prefix, section in sections():
        doc = (section.__doc__ or "").strip()
        title = f"## `[{prefix}]`" if prefix else "## Top level"
        lines += ["", title, "", doc, "", "| key | values | default | meaning |", "|---|---|---|---|"]
        for key, field in section.model_fields.items():
            if not is_section(field):
                default = "required" if field.is_required() else f"`{json.dumps(field.default)}`".replace("`null`", "absent")
                lines.append(f"| `{key}` | {_values(field)} | {default} | {field.description} |")
    return "\n".join(lines) + "\n"


def _values(field: FieldInfo) -> str:
    choices = [c for a in (field.annotation, *get_args(field.annotation)) for c in get_args(a) if isinstance(c, str)]
    words = ", ".join(f"`{c}`" for c in dict.fromkeys(choices))
    if choices and "float" not in str(field.annotation):
        return words
    kind = str(field.annotation).replace("typing.", "").replace("<class '", "").replace("'>", "")
    if kind.startswith("dict"):
        return "table"
    kind = "list of text" if "list[str]" in kind else "list of numbers" if "list" in kind else kind
    base = next((word for word in ("list of text", "list of numbers", "int", "float", "str") if word in kind), kind)
    bounds = [f"{op} {getattr(m, name)}" for m in _limits(field) for name, op in _BOUNDS if hasattr(m, name)]
    numbers = " ".join([{"str": "text", "int": "integer", "float": "number"}.get(base, base), *bounds])
    return f"{numbers}, {words}" if words else numbers


_BOUNDS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))


def _limits(field: FieldInfo) -> list[Any]:
    inner = [m for part in get_args(field.annotation) for m in getattr(part, "__metadata__", ())]
    return [x for m in [*field.metadata, *inner] for x in (m.metadata if isinstance(m, FieldInfo) else [m])]
