"""The commands of the first hour: `init`, `doctor` and `completion`."""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path
from typing import Any

from ..errors import ConfigError, listing
from ..files import write_atomic
from ..screen import marked

_INIT_FLAGS = ("data", "input", "label", "group", "group_pattern", "model", "gpus")


def add_commands(commands: Any) -> None:
    """Adds the commands and their arguments.

    Args:
        commands: the return value of argparse's `add_subparsers`.
    """
    init = commands.add_parser("init", help="write a configuration for your data, and check it; asks for what no flag says")
    init.add_argument("file", type=Path, help="the TOML file to write")
    init.add_argument(
        "--data", help="a folder with a folder of images for each class, a table (.csv), or an .npz of MedMNIST's form"
    )
    for role in ("input", "label", "group"):
        init.add_argument(f"--{role}", metavar="COLUMN", help=f"column of a table with the {role}; default: its usual name")
    init.add_argument(
        "--group-pattern", metavar="REGEX", help="for folders: what its brackets find in a file's name is the patient"
    )
    init.add_argument("--model", help="dinov2_small, minilm, a folder of transformers, or hub:owner/name")
    init.add_argument(
        "--study", type=Path, metavar="RUN", help="write a study of this run or configuration instead: methods over seeds"
    )
    init.add_argument("--gpus", help="GPUs of this machine for a training; 0: the processor")
    doctor = commands.add_parser(
        "doctor", help="look at this machine: torch, GPUs, Slurm, file system, shared memory, network"
    )
    doctor.add_argument("--folder", type=Path, default=Path("runs"), help="where runs will be written (default: runs)")
    completion = commands.add_parser("completion", help="print the script that completes the command line in a shell")
    completion.add_argument("shell", choices=("bash", "zsh"))


def init(options: argparse.Namespace) -> str:
    """Writes the configuration or the study of `dcft init`.

    Returns:
        The command that trains or runs it.

    Raises:
        ConfigError: the file exists, or see `ask` and `configuration`.
        DataError: see `configuration`.
    """
    from .init import ask, configuration, left_out, next_command, patients
    from .study_file import study_of

    file: Path = options.file
    if file.suffix != ".toml":
        raise ConfigError(f"{file}: the name of a configuration ends with .toml")
    if file.exists():
        raise ConfigError(f"{file} exists: dcft check {file} --data looks at it again; to write it anew, delete it first")
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", file.stem).lstrip("._-") or "mine"
    if options.study is not None:
        if given := [f"--{key}" for key in _INIT_FLAGS if getattr(options, key) is not None]:
            raise ConfigError(f"{listing(given)}: a study has the data and the model of {options.study}")
        write_atomic(file, study_of(options.study, name.replace(".", "_")))
        print(f"{file} is written. Its keys: docs/studies.md")
        return f"dcft compare {file} --count, which counts; then dcft compare {file}"
    answers = ask({key: getattr(options, key) for key in _INIT_FLAGS})
    write_atomic(file, configuration(answers, name))
    print(f"{file} is written. Its keys: docs/configuration.md")
    if answers.data.is_dir() and (others := left_out(answers.data)):
        print(f"left out, as {'it is' if len(others) == 1 else 'they are'} no image: {listing(map(str, others), 3)}")
    if answers.data.is_dir() and answers.group_pattern is None and (found := patients(answers.data)):
        _, different, number = found
        print(
            f"{marked('careful:', 'yellow')} {number} file names have only {different} beginnings. They are taken for "
            "patients: pictures of one stay in one split. If they are none, correct the line group_pattern in "
            f"{file}, or take it out"
        )
    return next_command(file, answers.gpus, answers.gpus > 0 and shutil.which("sbatch") is not None)


def doctor(options: argparse.Namespace) -> int:
    """Carries out `dcft doctor`.

    Returns:
        The exit code: 1 if a training would fail.
    """
    from .doctor import examine

    styles = {"good": ("ok  ", "green"), "note": ("note", "yellow"), "bad": ("BAD ", "red")}
    bad = 0
    for found in examine(options.folder):
        word, style = styles[found.verdict]
        print(f"{marked(word, style)} {found.part}: {found.text}", flush=True)
        bad += found.verdict == "bad"
    return int(bool(bad))
