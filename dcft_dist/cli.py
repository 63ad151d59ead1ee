"""The command line `dcft`: one function for each command."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from . import __version__
from .config.checks import check_ranks, fitted
from .config.needs import require_packages
from .config.schema import Config
from .config.toml import load_config
from .errors import ConfigError, DcftError, RunError, WorldError
from .files import expected_form
from .inference import command as inference
from .planning import command as planning
from .runs.folder import keep_private
from .runs.status import AGAIN, run_verdict, status
from .runs.stop import terminated
from .screen import marked
from .start import command as start
from .start.examples import EXAMPLES
from .studies import command as studies

_AFTER_SIGTERM = 143  # whoever sent it, such as Kubernetes, must not take the run for finished

Commands = Any  # the return type of argparse's `add_subparsers`; its class is private


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: words of the command line without the program; None: those of this process.

    Returns:
        The exit code: 0 for success, 2 for bad input, 1 for a temporary failure or a negative result, 75 for "start again",
        130 after Ctrl-C, 143 after SIGTERM.
        An error prints one line to standard error.
    """
    parser, _ = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in _TAKES_KEYS:
        parser.error(f"unrecognised arguments: {' '.join(rest)}")
    try:
        return int(_COMMANDS[options.command](options, rest) or 0)
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0 if options.command != "train" else _AFTER_SIGTERM if terminated() else 1
    except DcftError as error:
        # Every rank raises the error. Rank 0 prints it, and so does a rank that alone knows of it.
        rank = os.environ.get("RANK", "0")
        if rank == "0" or isinstance(error, WorldError) or error.alone:
            where = f"rank {rank}: " if error.alone and not str(error).startswith("rank ") else ""
            print(f"{marked('dcft: error:', 'bold red', sys.stderr)} {where}{error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"dcft: stopped; start {'it' if options.command == 'train' else 'the command'} again", file=sys.stderr)
        return 130
    except RecursionError:
        print(f"dcft: error: {options.command}: an input is nested too deeply", file=sys.stderr, flush=True)
        return 2
    except OSError as error:  # a full disk, a directory that cannot be written
        print(f"dcft: error: rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr, flush=True)
        return 2 if error.errno == errno.ENAMETOOLONG else 1


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the command line, and that of each command."""
    parser = argparse.ArgumentParser(prog="dcft", description="Divide-and-conquer fine-tuning of pre-trained models.")
    parser.epilog = (
        "first steps: init, train, report, predict; on a cluster: plan, submit, status; for a comparison: compare, table"
    )
    parser.add_argument("-V", "--version", action="version", version=f"dcft_dist {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (start.add_commands, _add_run, _add_use, _add_compare, _add_cluster, _add_plan, _add_generated):
        add(commands)
    for name, command in commands.choices.items():
        note = f"{command.epilog}\n\n" if command.epilog else ""
        command.epilog = "\n  ".join([f"{note}examples:", *EXAMPLES[name]])
        command.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser, commands.choices


def _add_run(commands: Commands) -> None:
    train = commands.add_parser(
        "train",
        help="run a configuration, or continue its run",
        epilog="any key of docs/configuration.md: --name, --seed, --optimizer.lr, --train.epochs, --train.global_batch, ...",
    )
    train.add_argument("config", help="a TOML file, or the name of a shipped one (icd.toml)")
    check = commands.add_parser("check", help="check a configuration, and whether its data and weights are installed")
    check.add_argument("config")
    check.add_argument("--ranks", type=int, default=1, help="number of ranks that will run it")
    check.add_argument("--data", action="store_true", help="also build the model, and read every input once")
    check.add_argument(
        "--sheet",
        type=Path,
        metavar="FILE",
        help="with --data: draw the first examples of each split as the model sees them (PNG)",
    )
    check.add_argument(
        "--hash", action="store_true", help="with --data: hash every file, and compare it with what the run first read"
    )
    inspect = commands.add_parser("inspect", help="show what a configuration does to each weight of its model")
    inspect.add_argument("config")
    _add_trust(inspect)


def _add_trust(command: argparse.ArgumentParser) -> None:
    command.add_argument("--trust-code", action="store_true", help="import the code that the run or configuration names")


def _add_use(commands: Commands) -> None:
    inference.add_commands(commands)
    interpolate = commands.add_parser(
        "interpolate",
        help="move a finished run's weights back towards their start, the fundamental set and the rest by different shares",
    )
    interpolate.add_argument("run", type=Path)
    _add_trust(interpolate)


def _add_compare(commands: Commands) -> None:
    verify = commands.add_parser("verify", help="check every file of a run or of a study: is it as it was written?")
    verify.add_argument("folder", type=Path, metavar="RUN|STUDY")
    report = commands.add_parser("report", help="write report.html of a run or of a study again")
    report.add_argument("run", type=Path)
    report.add_argument("--pictures", type=Path, metavar="DIR", help="also write each picture as a PNG to this folder")
    report.add_argument(
        "--examples",
        type=int,
        metavar="N",
        help="of a run: also show the N validation examples that are most wrong; the file then contains them",
    )
    _add_trust(report)
    table = commands.add_parser("table", help="compare finished runs, or the arms of a study")
    table.add_argument("runs", type=Path, nargs="+", help="directories of runs, a folder of runs, or that of one study")
    table.add_argument("--format", choices=("md", "csv", "tex"), default="md", help="format of a study's table")
    table.add_argument("--pack", type=Path, metavar="DIR", help="also write the study with all its results to this folder")
    table.add_argument("--removal", action="store_true", help="show the removal check of each run instead")
    compare = commands.add_parser(
        "compare", help="run a study (STUDY.toml), or the rest of it: arms x seeds x settings; any key, for every cell"
    )
    studies.add_arguments(compare)


def _add_cluster(commands: Commands) -> None:
    status = commands.add_parser("status", help="status of a run: step, time left, starts, last checkpoint, last failure")
    status.add_argument("run", help="a run's directory, or its configuration (then any key, as for train)")
    status.add_argument(
        "--verdict",
        action="store_true",
        help=f"for batch scripts: exit code 0 finished, {AGAIN} start again, 1 failed (do not start again)",
    )
    submit = commands.add_parser(
        "submit",
        help="send a run to a cluster",
        epilog="any key, as for train. Site settings: DCFT_SITE names a TOML file (docs/clusters.md)",
        allow_abbrev=False,
    )
    submit.add_argument("config")
    submit.add_argument("--nodes", type=int, default=1)
    submit.add_argument("--gpus-per-node", type=int, default=0)
    submit.add_argument("--ranks-per-node", type=int, help="default: a rank for each GPU, or two without GPUs")
    submit.add_argument("--cpus-per-task", type=int, help="CPU cores of a node")
    submit.add_argument("--time", help="time limit, such as 24:00:00")
    submit.add_argument("--with", dest="way", choices=("slurm", "submitit", "torchrun"), default="slurm")
    submit.add_argument("--smoke", action="store_true", help="run 20 steps, then estimate hours and end of the whole run")
    submit.add_argument("--dry-run", action="store_true", help="print the sbatch file instead of submitting it")


def _add_plan(commands: Commands) -> None:
    plan = commands.add_parser(
        "plan", help="forecast memory by kind and bytes sent, for each of N GPUs; no GPU is needed", allow_abbrev=False
    )
    planning.add_arguments(plan)
    _add_trust(plan)


def _add_generated(commands: Commands) -> None:
    commands.add_parser("config-reference", help="print the reference of all configuration keys (docs/configuration.md)")
    files = commands.add_parser("slurm-files", help="write the sbatch files of slurm/ again")
    files.add_argument("folder", type=Path)


def _load(path: str | Path, words: Sequence[str], runs: bool = False) -> Config:
    """Reads a configuration. If it is private, so is every file that this process writes from now on.

    `runs`: its model or its data are used, so the packages that it needs must be there.
    """
    config = load_config(path, words)
    if runs:
        require_packages(config, path)
    return keep_private(config)


def _train(options: argparse.Namespace, rest: list[str]) -> int:
    from .train.run import train

    return _AFTER_SIGTERM if not train(_load(options.config, rest, runs=True)) and terminated() else 0


def _init(options: argparse.Namespace, rest: list[str]) -> None:
    following = start.init(options)
    if options.study is None:
        _check(_parser()[0].parse_args(["check", str(options.file), "--data"]), [])
    print(f"next: {following}")


def _doctor(options: argparse.Namespace, rest: list[str]) -> int:
    return start.doctor(options)


def _completion(options: argparse.Namespace, rest: list[str]) -> None:
    from .start.completion import completion

    parser, commands = _parser()
    sys.stdout.write(completion(parser, [commands[name] for name in _TAKES_KEYS], options.shell))


def _status(options: argparse.Namespace, rest: list[str]) -> int:
    from .runs.folder import RunFolder

    is_folder = not options.run.endswith(".toml")
    if is_folder and not options.verdict and not rest:  # also of a run with a damaged configuration
        with expected_form(Path(options.run)):
            print(status(Path(options.run)))
        return 0
    file = str(Path(options.run) / "config.toml") if is_folder else options.run
    if is_folder and not Path(file).exists():
        raise RunError(f"no run in {options.run}")
    config = _load(file, rest)
    folder = RunFolder(Path(options.run)) if is_folder else RunFolder.of(config)
    if not options.verdict:
        with expected_form(folder.path):
            print(status(folder.path))
        return 0
    verdict, reason = run_verdict(folder.path, folder.reached(), config.max_attempts, config.until)
    print(f"{folder.path}: {verdict}: {reason}", flush=True)
    return {"finished": 0, "again": AGAIN, "failed": 1}[verdict]


def _check(options: argparse.Namespace, rest: list[str]) -> None:
    config = _load(options.config, rest, runs=True)
    if (options.sheet or options.hash) and not options.data:
        raise ConfigError("--sheet and --hash need --data, which reads the inputs")
    from .data.tasks import load_task
    from .models.build import check_model
    from .runs.folder import RunFolder

    check_ranks(config, options.ranks)
    RunFolder.of(config).check(config)
    check_model(config)
    if options.data:
        from .data.contents import Contents
        from .data.understood import contact_sheet, description
        from .train.context import check_inputs, read_materials

        materials = read_materials(config)
        _print_lowered(config, len(materials.task.train), options.ranks)
        check_inputs(materials)
        print(description(materials.task, materials.pretrained.processor))
        if options.sheet:
            number = contact_sheet(materials.task, materials.pretrained.processor, options.sheet)
            print(f"{options.sheet}: {number} pictures")
        if options.hash:
            contents = Contents(materials.task.splits, RunFolder.of(config).contents)
            contents.load()
            contents.stamp()
            print(f"{contents.read_all(again=True)} files contain what the run has read first, or were not read yet")
        print(f"{config.name}: the configuration is valid, its weights fit the model, and its data can be read")
        return
    _print_lowered(config, len(load_task(config).train), options.ranks)
    print(f"{config.name}: the configuration is valid, and its data and weights are installed")


def _print_lowered(config: Config, num_train: int, ranks: int) -> None:
    print("".join(f"{config.name}: {line}\n" for line in fitted(config, num_train, ranks)[1]), end="")


def _inspect(options: argparse.Namespace, rest: list[str]) -> None:
    from .config.trust import require_trust

    config = _load(options.config, rest, runs=True)
    require_trust(config, options.config, options.trust_code, rest)
    from .data.tasks import load_task
    from .models.build import build_model
    from .objectives.make import label_facts, make_objective
    from .planning.inspection import inspection
    from .train.methods import choose_trained

    task = load_task(config)
    objective = make_objective(config, label_facts(config, task.class_names, task.train.labels))
    pretrained = build_model(config, objective.num_outputs)
    choose_trained(pretrained, config)
    print(inspection(pretrained, config))


def _interpolate(options: argparse.Namespace, rest: list[str]) -> None:
    from .distributed.world import joined_world
    from .train.interpolate import interpolate

    if (options.run / "config.toml").is_file():
        _load(options.run / "config.toml", ())  # private?
    with joined_world(600.0) as world:
        found = interpolate(options.run, world, options.trust_code)
        if world.is_first:
            from .reports.interpolation import interpolation_table
            from .reports.model_card import write_card
            from .reports.run_report import write_report

            folder = options.run / "interpolation"
            write_card(folder / "model", _load(folder / "config.toml", ()), found)
            print(interpolation_table(found["interpolation"]))
            print(f"report: {write_report(folder)}")


def _report(options: argparse.Namespace, rest: list[str]) -> None:
    from .reports.run_report import write_report
    from .studies.report import write_study_report

    with expected_form(options.run):
        if (options.run / "config.toml").is_file():
            _load(options.run / "config.toml", ())  # private?
        if not (options.run / "study.toml").exists():
            wrong = _wrong(options)
            print(write_report(options.run, options.pictures, wrong))
            if wrong:
                print(f"careful: it contains {len(wrong)} validation examples, which whoever gets the file sees")
            if len(wrong) < (options.examples or 0):
                print(f"of the validation examples only {len(wrong)} went wrong")
        elif options.examples is not None:
            raise RunError(f"{options.run} is a study: --examples needs the folder of a run")
        else:
            print(write_study_report(options.run, options.pictures))


def _wrong(options: argparse.Namespace) -> list[Any]:
    """The examples that a report shows: none, unless they are asked for."""
    if options.examples is None:
        return []
    if options.examples < 1:
        raise ConfigError(f"--examples {options.examples}: must be at least 1")
    from .distributed.world import joined_world
    from .inference.mistakes import mistakes

    with joined_world(600.0) as world:
        return [astuple(found) for found in mistakes(options.run, options.examples, world, options.trust_code)]


def _verify(options: argparse.Namespace, rest: list[str]) -> int:
    if (options.folder / "study.toml").exists():
        from .studies.results import StudyFolder
        from .studies.study import load_study

        study = StudyFolder(load_study(options.folder / "study.toml"), options.folder)
        missing, number = study.missing()
        whole, broken = [f"{number - missing} of {number} cells have results"], study.problems()
    else:
        from .train.verify import verify_run

        with expected_form(options.folder):
            whole, broken = verify_run(options.folder)
    print("\n".join([*(f"whole    {line}" for line in whole), *(f"DAMAGED  {line}" for line in broken)]))
    return int(bool(broken))


def _table(options: argparse.Namespace, rest: list[str]) -> None:
    if (options.runs[0] / "study.toml").exists():
        from .studies.results import StudyFolder
        from .studies.study import load_study
        from .studies.table import table

        folder = options.runs[0]
        with expected_form(folder):
            if options.pack:
                study = load_study(folder / "study.toml")
                if study.is_private():
                    os.umask(0o077)
                StudyFolder(study, folder).pack(options.pack)
            print(table(folder, options.format))
        return
    from .reports.comparison import comparison, removal_table
    from .runs.folder import runs_in

    runs = [run for place in options.runs for run in runs_in(place) or [place]]
    with expected_form(runs[0]):
        print("\n\n".join(map(removal_table, runs)) if options.removal else comparison(runs))


def _submit(options: argparse.Namespace, rest: list[str]) -> None:
    from .cluster.job import load_site, make_job
    from .cluster.render import render_sbatch, render_torchrun
    from .cluster.submit import check_cluster, submit_sbatch
    from .cluster.submitit_job import submit_submitit

    site = load_site()
    sizes = {key: getattr(options, key) for key in ("nodes", "gpus_per_node", "ranks_per_node", "cpus_per_task", "time")}
    job, config = make_job(options.config, rest, smoke=options.smoke, site=site, **sizes)
    keep_private(config)
    folder = Path(config.runs_dir) / config.name
    if options.way == "torchrun" or options.dry_run:
        render = render_torchrun if options.way == "torchrun" else render_sbatch
        sys.stdout.write(render(job, site))
        return
    check_cluster(job, site)
    job_id = submit_submitit(job, site, folder).job_id if options.way == "submitit" else None
    print(f"job {job_id or submit_sbatch(job, site, folder)}; status: dcft status {folder}")


def _slurm_files(options: argparse.Namespace, rest: list[str]) -> None:
    from .cluster.job import Site
    from .cluster.render import render_sbatch
    from .cluster.shipped_files import FILES

    for name, job in FILES.items():
        (options.folder / name).write_text(render_sbatch(job, Site()))


def _config_reference(options: argparse.Namespace, rest: list[str]) -> None:
    from .config.reference import reference

    sys.stdout.write(reference())


_COMMANDS = {
    "init": _init,
    "doctor": _doctor,
    "completion": _completion,
    "train": _train,
    "check": _check,
    "inspect": _inspect,
    **inference.COMMANDS,
    "interpolate": _interpolate,
    "status": _status,
    "verify": _verify,
    "report": _report,
    "table": _table,
    "compare": studies.run,
    "submit": _submit,
    "plan": planning.run,
    "config-reference": _config_reference,
    "slurm-files": _slurm_files,
}


_TAKES_KEYS = ("train", "check", "inspect", "evaluate", "predict", "status", "submit", "plan", "compare")


def entry() -> None:
    """Runs `main` as console script, and ends the process at once by `os._exit`.

    After an error the threads of a process group cannot be joined. After a success gloo's threads abort the process if they
    still have tensors to free while the interpreter shuts down (pytorch issue 190489).
    """
    sys.unraisablehook = lambda _: None  # destructors of half-made objects, after an error that was told already
    _quiet()
    code = main()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _quiet() -> None:
    """Leaves out what MONAI says about itself at each start, and about which a user can do nothing."""
    logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)  # an optional decoder is missing
    warnings.filterwarnings("ignore", message="NvImgCodecPydicomReader")
    warnings.filterwarnings("ignore", category=FutureWarning, module="monai")


if __name__ == "__main__":
    entry()
