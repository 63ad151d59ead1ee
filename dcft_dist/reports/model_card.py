"""The model card of an exported model: data, method, fundamental set and metrics, from the summary of its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config.schema import Config
from ..files import write_atomic
from .about import KINDS, base_of
from .interpolation import interpolation_table
from .render import results_of, template, what_it_is


def _snippet(config: Config, base: str, num_outputs: int) -> str:
    """Lines of Python that load the exported model in its library."""
    build = config.model.build or "transformers.AutoModel"
    package, _, name = build.replace(":", ".").rpartition(".")
    lines = [f"from {package} import {name}"]
    if package.startswith("transformers"):
        lines.append(f'model = {name}.from_pretrained("FOLDER")')
    else:
        values = {key: num_outputs if value == "num_outputs" else value for key, value in config.model.args.items()}
        arguments = [f"{key}={value!r}" for key, value in values.items()]
        lines = ["from safetensors.torch import load_file", *lines, f"model = {name}({', '.join(arguments)})"]
        lines.append('model.load_state_dict(load_file("FOLDER/model.safetensors"))')
    if config.has_adapters and package.startswith("transformers"):
        lines += ["", "# or the adapter alone, on the model that was adapted:", "from peft import PeftModel"]
        lines.append(f'model = PeftModel.from_pretrained({name}.from_pretrained("{base}"), "FOLDER/adapter")')
    if config.model.features or config.model.name != "own":
        lines += ["", '# the head, a linear layer, is in "FOLDER/head/model.safetensors"']
    return "\n".join(lines)


def write_card(folder: Path, config: Config, summary: dict[str, Any]) -> None:
    """Writes the model card as `README.md`.

    Args:
        folder: of the exported model.
        config: of the run.
        summary: of the run, the content of its `summary.json`.
    """
    names = summary["labels"]["names"]
    base = base_of(config)
    found = summary.get("interpolation")
    facts = {
        "interpolation": interpolation_table(found) if found else "",
        "base": base,
        "rest": config.penalty.rest_factor if summary.get("num_selected") else 1,
        "snippet": _snippet(config, str(base), 1 if config.task.kind == "regression" else len(names)),
        "what": what_it_is(summary),
        "task": KINDS[config.task.kind].format(n=len(names)),
        "names": ", ".join(names) if config.task.kind != "causal_lm" else "",
        "splits": {name: f"{n:,} examples in {groups:,} groups" for name, (n, groups) in summary["splits"].items()},
    }
    write_atomic(folder / "README.md", template("card.md").render(s=summary, results=results_of(summary), **facts))
