"""The command `dcft compare`: its arguments, and how it runs a study in this process or in several."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tomllib
from pathlib import Path

from ..config.toml import find_config


def add_arguments(compare: argparse.ArgumentParser) -> None:
    """Adds the arguments of `dcft compare`."""
    compare.add_argument("study", type=Path, help="the study's TOML file; dcft init FILE --study RUN writes one")
    compare.add_argument("--folder", type=Path, help="folder for the results (default: runs/<name of the file>)")
    compare.add_argument("--workers", type=int, default=1, help="number of processes on this machine")
    compare.add_argument("--share", metavar="I/N", help="run only the I-th of N shares (for array jobs)")
    compare.add_argument("--wait", type=float, default=86400.0, metavar="S", help="seconds to wait for other shares")
    compare.add_argument("--count", action="store_true", help="run nothing: count trainings and examples")
    compare.add_argument(
        "--again", type=float, metavar="PART", help="run this fraction of the finished cells again, and compare"
    )


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Carries out `dcft compare`.

    Args:
        options: its arguments.
        rest: further words: keys and values of the configuration, for every cell.

    Returns:
        The exit code.
    """
    options.study = find_config(options.study)
    folder = options.folder or Path("runs") / options.study.stem
    rest = rest or _known(folder)
    _keep_private(options.study, folder, rest)
    if options.count:
        from .size import size_of

        print(size_of(options.study, folder, rest))
        return 0
    if options.workers > 1 and not options.share and options.again is None:
        from .study import load_study

        load_study(options.study, rest)  # an error prints one message, not one for each process
        words = ["compare", str(options.study), "--folder", str(folder), "--wait", str(options.wait), *rest, "--share"]
        command = [sys.executable, "-m", "dcft_dist.cli", *words]
        from .runner import in_parallel

        code = in_parallel(lambda share: subprocess.Popen([*command, share]), options.workers)
        if not code:
            _print_next(folder)
        return code
    import torch

    from ..distributed.world import joined_world
    from .again import again
    from .runner import CellShare, compare, quiet

    share = CellShare.parse(options.share or "1/1")
    quiet()
    if "OMP_NUM_THREADS" not in os.environ:  # otherwise torch has already read it
        torch.set_num_threads(1)  # the last digits depend on it; they must not depend on --workers
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with joined_world(3600.0) as world:
        if options.again is not None:
            found = again(options.study, folder, world, options.again, rest)
            print(found.text)
            return int(not found.same)
        compare(options.study, folder, world, share, options.wait, rest)
        if world.is_first and not options.share:
            _print_next(folder)
    return 0


def _print_next(folder: Path) -> None:
    """What to do with a finished study."""
    print(f"{folder} is complete. Its table: dcft table {folder}. Its report: dcft report {folder}")


def _known(folder: Path) -> list[str]:
    """The keys that an earlier start of the study was given on the command line."""
    try:
        words = tomllib.loads((folder / "study.toml").read_text(encoding="utf-8")).get("overrides", [])
    except (OSError, ValueError):
        return []
    if words:
        print(f"going on with {' '.join(words)}", file=sys.stderr)
    return list(map(str, words))


def _keep_private(study: Path, folder: Path, rest: list[str]) -> None:
    """If runs of the study are private, so is every file that this process writes from now on."""
    from .study import load_study

    if load_study(study, rest).is_private():
        os.umask(0o077)
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
