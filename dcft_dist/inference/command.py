"""The commands that use a finished run: `evaluate`, `predict`, `delta`, `shira`, `export` and `push`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..config.schema import Config
from ..errors import ConfigError, RunError, counted


def add_commands(commands: Any) -> None:
    """Adds the commands and their arguments.

    Args:
        commands: the return value of argparse's `add_subparsers`.
    """
    for name, text in (
        ("evaluate", "evaluate a finished run's model on other data: metrics with confidence intervals"),
        ("predict", "predictions of a finished run's model for other data, as CSV"),
    ):
        use = commands.add_parser(name, help=text, epilog="the data: --data.path new.csv, and any other key of [data]")
        use.add_argument("run", type=Path, nargs="+", help="directories of finished runs; of several, the mean is taken")
        use.add_argument(
            "--flips", action="store_true", help="take the mean over mirrored images or volumes too (test-time augmentation)"
        )
        use.add_argument("--out", type=Path, metavar="FILE", help="default: standard output")
        if name == "predict":
            use.add_argument(
                "--masks", type=Path, metavar="FOLDER", help="segmentation: write a NIfTI file for each image to this folder"
            )
            use.add_argument("--tokens", type=int, help="causal_lm: maximum number of tokens in an answer (default: 128)")
        _add_trust(use)
    delta = commands.add_parser("delta", help="write the changes of fine-tuning to one file, or apply such a file")
    delta.add_argument(
        "run", type=Path, help="directory of a finished run (with --apply its config.toml and summary.json are enough)"
    )
    delta.add_argument("file", type=Path)
    delta.add_argument(
        "--apply", type=Path, metavar="FOLDER", help="apply the file, and write the fine-tuned model to this folder"
    )
    _add_trust(delta)
    shira = commands.add_parser("shira", help="write the changes of a sparse fine-tuning as a SHiRA adapter, for peft")
    shira.add_argument("run", type=Path, help="directory of a finished run with penalty.rest_factor = 0")
    shira.add_argument("folder", type=Path)
    _add_trust(shira)
    export = commands.add_parser("export", help="write a finished run's model with its head for other programs")
    export.add_argument("run", type=Path)
    export.add_argument("place", type=Path, help="a folder (transformers), or a file that ends with .onnx")
    export.add_argument("--to", choices=("transformers", "onnx"), default="transformers")
    _add_trust(export)
    push = commands.add_parser("push", help="send a finished run's exported model to a hub")
    push.add_argument("run", type=Path)
    push.add_argument("name", help="owner/name of the repository")
    push.add_argument("--public", action="store_true", help="a new repository can be read by everybody")
    _add_trust(push)


def _add_trust(command: argparse.ArgumentParser) -> None:
    command.add_argument("--trust-code", action="store_true", help="import the code that the run or configuration names")


def use(options: argparse.Namespace, rest: list[str]) -> None:
    """Carries out `dcft evaluate` and `dcft predict`."""
    import json

    from ..distributed.world import joined_world
    from ..files import table_of, write_atomic
    from ..runs.folder import RunFolder, keep_private
    from .ensemble import evaluate_together, segment_together
    from .load import load_adapted
    from .predict import evaluate_split, given_split, predictions, predictions_of, report_of

    for place in options.run[1:]:
        if place.exists() and not (place / "config.toml").is_file():
            raise ConfigError(f"{place} is not the folder of a run. If these are the data: --data.path {place}")
    labelled = options.command == "evaluate"
    with joined_world(600.0) as world:
        together = len(options.run) > 1 or options.flips
        masks = together and RunFolder(options.run[0]).finished()[0].task.kind == "segmentation"
        if together and not masks and (getattr(options, "masks", None) or getattr(options, "tokens", None) is not None):
            raise ConfigError("--masks is for a segmentation, and --tokens for the answers of a single run")
        if together and not masks:
            adapted, split, found, examples = evaluate_together(
                options.run, rest, world, options.trust_code, labelled, options.flips
            )
        else:
            adapted = (
                segment_together(options.run, rest, world, options.trust_code, options.flips)
                if masks
                else load_adapted(options.run[0], rest, world, options.trust_code)
            )
            split = given_split(adapted, labelled)
            if labelled:
                found, examples = evaluate_split(adapted, split)
        keep_private(adapted.config)
        if labelled:
            text = json.dumps(report_of(adapted, split, found, examples), indent=2) + "\n"
        elif together and not masks:
            text = table_of(predictions_of(adapted, split, found))
        else:
            text = table_of(predictions(adapted, split, options.masks, options.tokens))
        if not world.is_first:
            return
        if not options.out:
            sys.stdout.write(text)
            return
        write_atomic(options.out, text)
        print(f"{options.out}: {'metrics of' if labelled else 'predictions for'} {counted(len(split), 'example')}")


def delta(options: argparse.Namespace, rest: list[str]) -> None:
    """Carries out `dcft delta`."""
    from ..distributed.world import joined_world
    from .delta import apply_delta, write_delta

    config, facts, model = _finished(options, unaltered=not options.apply)
    with joined_world(600.0):
        if options.apply:
            apply_delta(config, facts, options.file, options.apply)
            print(options.apply)
            return
        changed, total = write_delta(config, facts, model, options.file)
    size = options.file.stat().st_size
    print(f"{options.file}: {changed:,} of {total:,} weights changed ({changed / total:.1%}); {size:,} bytes")


def shira(options: argparse.Namespace, rest: list[str]) -> None:
    """Carries out `dcft shira`."""
    from ..distributed.world import joined_world
    from .shira import write_shira

    config, facts, model = _finished(options)
    with joined_world(600.0):
        size = write_shira(config, facts, model, options.folder)
    print(
        f"{options.folder}: rank {size.rank}, {size.layers} layers, {size.entries:,} entries, {size.changed:,} of them "
        f"changed weights, the others 0; {size.num_bytes:,} bytes"
    )


def export(options: argparse.Namespace, rest: list[str]) -> None:
    """Carries out `dcft export`.

    Raises:
        RunError: `place` does not fit `--to`.
    """
    from ..distributed.world import joined_world
    from .export import adapted_model, export_to_onnx, export_to_transformers

    if (options.to == "onnx") != (options.place.suffix == ".onnx"):
        wanted = "--to onnx writes a file that ends with .onnx" if options.to == "onnx" else "add --to onnx for a file"
        raise RunError(f"{options.place}: {wanted}")
    if options.to == "transformers" and options.place.exists() and not options.place.is_dir():
        raise RunError(f"{options.place} is a file: name a folder")
    config, facts, model = _finished(options)
    with joined_world(600.0):
        pretrained = adapted_model(config, facts, model)
        if options.to == "onnx":
            inputs = export_to_onnx(pretrained, config, facts, options.place)
            print(f"{options.place}: inputs {', '.join(inputs)}; output: outputs. It gives the outputs of the run's model")
            return
        name = export_to_transformers(pretrained, config, facts, options.place)
    print(f"{options.place}: a {name}. It gives the outputs of the run's model")


def push(options: argparse.Namespace, rest: list[str]) -> None:
    """Carries out `dcft push`."""
    from .push import push_model

    config, _, model = _finished(options)
    print(push_model(config, model, options.name, options.public))


def _finished(options: argparse.Namespace, unaltered: bool = True) -> tuple[Config, dict[str, Any], Path]:
    """Configuration, facts and exported model of a finished run that the user trusts."""
    from ..config.trust import require_trust
    from ..runs.folder import RunFolder, keep_private

    folder = RunFolder(options.run)
    config, facts = folder.finished()
    require_trust(config, options.run, options.trust_code)
    keep_private(config)
    if unaltered:
        folder.require_unaltered()
    return config, facts, folder.model


COMMANDS = {"evaluate": use, "predict": use, "delta": delta, "shira": shira, "export": export, "push": push}
