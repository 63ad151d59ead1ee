"""The console script `dcft`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .config import check_ranks, check_sizes, load_config, reference
from .errors import DcftError, WorldError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; bad input is one line on standard error and exit code 2."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in ("train", "check"):
        parser.error(f"unrecognised arguments: {' '.join(rest)}")
    try:
        return int(_COMMANDS[options.command](options, rest) or 0)
    except DcftError as error:
        # Every rank raises; one line is enough unless only this rank knows what happened.
        if os.environ.get("RANK", "0") == "0" or isinstance(error, WorldError):
            print(f"dcft: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except OSError as error:  # a full disk, a directory that cannot be written
        print(f"dcft: error: rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr, flush=True)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dcft", description="Divide-and-conquer fine-tuning of pre-trained models.")
    parser.add_argument("--version", action="version", version=f"dcft_dist {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train", help="run a configuration, or go on with it", epilog="any key: --optimizer.lr 1e-4 --name my_run"
    )
    train.add_argument("config", help="a TOML file, or the name of one that is shipped (icd.toml)")
    check = commands.add_parser("check", help="check a configuration and that its data and weights are installed")
    check.add_argument("config")
    check.add_argument("--ranks", type=int, default=1, help="number of ranks that will run it")
    report = commands.add_parser("report", help="make report.html of a run again")
    report.add_argument("run", type=Path)
    report.add_argument("--pictures", type=Path, metavar="DIR", help="also write each picture as a PNG there")
    table = commands.add_parser("table", help="compare finished runs")
    table.add_argument("runs", type=Path, nargs="+")
    table.add_argument("--removal", action="store_true", help="the removal check of each run instead")
    commands.add_parser("config-reference", help="print docs/configuration.md")
    return parser


def _train(options: argparse.Namespace, rest: list[str]) -> None:
    config = load_config(options.config, rest)
    logging.basicConfig(level=logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    from .report import write_report
    from .trainer import run
    from .world import joined_world

    with joined_world(config.timeout_s) as world:
        run(config, world)
        if world.is_first:
            path = write_report(Path(config.runs_dir) / config.name)
            print(f"report: {path}", flush=True)


def _check(options: argparse.Namespace, rest: list[str]) -> None:
    config = load_config(options.config, rest)
    from .models import minilm_folder
    from .tasks import load_task

    check_ranks(config, options.ranks)
    minilm_folder()
    check_sizes(config, len(load_task(config.task).train))
    print(f"{config.name}: the configuration is valid, and its data and weights are installed")


def _report(options: argparse.Namespace, rest: list[str]) -> None:
    from .report import write_report

    print(write_report(options.run, options.pictures))


def _table(options: argparse.Namespace, rest: list[str]) -> None:
    from .report import comparison, removal_table

    print("\n\n".join(map(removal_table, options.runs)) if options.removal else comparison(options.runs))


def _config_reference(options: argparse.Namespace, rest: list[str]) -> None:
    sys.stdout.write(reference())


_COMMANDS = {
    "train": _train,
    "check": _check,
    "report": _report,
    "table": _table,
    "config-reference": _config_reference,
}


def entry() -> None:
    """The process's end, at once: after an error the threads of a process group cannot be joined, and after a success
    gloo's threads abort the process if they still have tensors to free while the interpreter shuts down (torch 2.13).
    """
    code = main()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    entry()
