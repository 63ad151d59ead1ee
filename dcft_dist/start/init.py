"""`dcft init`: a configuration for the user's own data, from flags or from answers."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.identity import beginnings
from ..data.readers import IMAGES, VOLUMES
from ..data.splits import is_hidden
from ..data.tables import records
from ..errors import ConfigError, DataError, did_you_mean, listing

_TABLES = {".csv", ".tsv", ".jsonl", ".json", ".parquet"}
_INPUTS = ("path", "image", "file", "filename", "text", "report", "note", "prompt", "input", "scan", "volume")
_LABELS = ("label", "class", "diagnosis", "target", "finding", "grade", "code", "answer", "mask")
_GROUPS = ("patient", "patient_id", "subject", "subject_id", "case", "group")
_ROWS = 200  # of a table that are looked at


@dataclass(frozen=True)
class Answers:
    """What the user has said.

    Attributes:
        data: a folder with a folder of images for each class, a table, or an .npz file of MedMNIST's form.
        input, label, group: columns of a table; None: the usual names are looked for.
        group_pattern: regular expression; what its brackets find in a file's name is the patient. For folders of images.
        model: `dinov2_small`, `minilm`, or a folder or `hub:owner/name` of transformers; None: the one for these data.
        gpus: GPUs of this machine to train on; 0: the processor.
    """

    data: Path
    input: str | None = None
    label: str | None = None
    group: str | None = None
    group_pattern: str | None = None
    model: str | None = None
    gpus: int = 0


def ask(given: dict[str, Any]) -> Answers:
    """Asks at the terminal for what no flag has said.

    Args:
        given: the flags, None for those that are absent.

    Raises:
        ConfigError: something is missing, and nobody sits at a terminal.
    """
    questions = {
        "data": ("Where are your data (a folder of images by class, a table of texts or files)? ", ""),
        "gpus": ("How many GPUs has this machine for it (Enter: 0)? ", "0"),
    }
    answers = dict(given)
    for key, (question, otherwise) in questions.items():
        if answers[key] is None and not sys.stdin.isatty():
            raise ConfigError(f"--{key} is missing: {question.strip()}")
        while answers[key] is None:
            try:
                answers[key] = input(question).strip() or otherwise or None
            except EOFError as error:
                raise ConfigError(f"--{key} is missing, and the input has ended") from error
    try:
        return Answers(**{**answers, "data": Path(answers["data"]).expanduser(), "gpus": int(answers["gpus"])})
    except ValueError as error:
        raise ConfigError(f"--gpus {answers['gpus']!r} is no number") from error


def configuration(answers: Answers, name: str) -> str:
    """The configuration as TOML.

    Args:
        answers: what the user has said.
        name: name of the run.

    Raises:
        ConfigError: a column is missing, or no model can be proposed for these data.
        DataError: there are no data of a known form.
    """
    data, modality, kind = _data_of(answers)
    parallel, model = answers.gpus > 1, _model_of(answers.model, modality, kind)
    lines = [
        f"name = {json.dumps(name)}",
        f'engine = "{"fsdp2" if parallel else "single"}"',
        "",
        "[model]",
        *model,
        "",
        "[task]",
        'name = "own"',
        f'kind = "{kind}"',
        *(["max_tokens = 128            # longer texts are cut"] if modality == "text" else []),
        "",
        "[data]",
        *(f"{key} = {json.dumps(value)}" for key, value in data.items()),
        *(
            [f'{"" if _has_monai() else "# "}augment = "light"           # random variants, by the package monai']
            if modality == "image"
            else []
        ),
        *_group_line(answers, data),
        "",
        "[removal]",
        "fractions = []              # [0.01, 0.05]: also evaluate the model without the selected weights; takes a while",
        "",
        "[optimizer]",
        f"lr = {_rate(model)}                   # choose it on the validation data: also try a fourth and the double of it",
        "",
        "[train]",
        "epochs = 5",
        *(['precision = "bf16"'] if answers.gpus else []),
    ]
    return "\n".join(lines) + "\n"


def patients(place: Path) -> tuple[str, int, int] | None:
    """What may be patients in a folder's images by class.

    Returns:
        Pattern and number of beginnings (`data.identity.beginnings`), and the number of images; None if none repeat.
    """
    files = [file for file in place.rglob("*") if file.suffix.lower() in IMAGES and not file.name.startswith(".")]
    found = beginnings([file.name for file in files], len({file.parent for file in files}))
    return (*found, len(files)) if found else None


def left_out(place: Path) -> list[Path]:
    """Files in a folder of images by class that are not read, as they are no images by their names."""
    files = (file for folder in place.iterdir() if folder.is_dir() for file in folder.rglob("*") if file.is_file())
    return sorted(f for f in files if f.suffix.lower() not in IMAGES and not is_hidden(f.name))


def _group_line(answers: Answers, data: dict[str, str]) -> list[str]:
    if data.get("format") != "image_folder":
        return []
    if answers.group_pattern is not None:
        return [f"group_pattern = {json.dumps(answers.group_pattern)}"]
    found = patients(answers.data)
    line = f"group_pattern = {json.dumps(found[0] if found else '^([^_]+)_')}"
    return [f"{'' if found else '# '}{line}   # the part of a file's name that is the patient: not to be in two splits"]


def _rate(model: Sequence[str]) -> str:
    """MiniLM was tuned to 2e-4 on texts, DINOv2 to 2e-5 on images (docs/results/studies); the lower one for all others."""
    return "2e-4" if 'name = "minilm"' in model else "2e-5"


def next_command(file: Path, gpus: int, slurm: bool) -> str:
    """The command that trains a configuration.

    Args:
        file: the configuration.
        gpus: GPUs of this machine.
        slurm: whether the machine belongs to a Slurm cluster.
    """
    if slurm:
        return f"dcft submit {file} --gpus-per-node {gpus} --time 4:00:00"
    return f"torchrun --nproc-per-node {gpus} -m dcft_dist.cli train {file}" if gpus > 1 else f"dcft train {file}"


def _data_of(answers: Answers) -> tuple[dict[str, str], str, str]:
    """Keys of `[data]`, the modality and the kind of task.

    Raises:
        ConfigError: a column is missing.
        DataError: there are no data of a known form.
    """
    place = answers.data
    path = str(place.absolute())
    if not place.exists():
        raise DataError(f"{place} does not exist")
    if place.is_dir():
        folders = [child for child in place.iterdir() if child.is_dir() and not child.name.startswith(".")]
        images = itertools.islice((f for folder in folders for f in folder.rglob("*") if f.suffix.lower() in IMAGES), 1)
        if not list(images):
            way = "make them, or name a table (.csv)"
            if any(file.suffix.lower() in IMAGES for file in place.iterdir()):
                way = f"the images are in it itself. Make them, or name the folder above if {place.name} is a class"
            raise DataError(f"{place} has no folders with images, one for each class: {way}")
        return {"format": "image_folder", "path": path}, "image", "single_label"
    if place.suffix == ".npz" and place.is_file():
        return {"format": "medmnist", "path": path}, "image", "single_label"
    if place.suffix not in _TABLES:
        raise DataError(
            f"{place} is neither a folder of images, nor a table ({', '.join(sorted(_TABLES))}), nor an .npz file"
        )
    rows = [row for _, row in itertools.islice(records(place), _ROWS)]
    if not rows:
        raise DataError(f"{place} has no rows")
    columns = list(rows[0])
    inputs = _column("input", answers.input, columns, _INPUTS)
    label = _column("label", answers.label, columns, _LABELS)
    group = answers.group or next((name for name in columns if name.lower() in _GROUPS), None)
    if group is not None and group not in columns:
        raise ConfigError(f"--group {group}: {place} has the columns {', '.join(columns)}")
    modality = _modality([str(row[inputs]) for row in rows])
    found = {"modality": modality, "path": path, "input": inputs, "label": label}
    return {**found, **({"group": group} if group else {})}, modality, _kind([row[label] for row in rows], modality)


def _column(role: str, given: str | None, columns: Sequence[str], usual: Sequence[str]) -> str:
    """The column of a role: the given one, or the only one with a usual name."""
    if given is not None:
        if given not in columns:
            raise ConfigError(f"--{role} {given}: there is no such column{did_you_mean(given, columns)}")
        return given
    found = [name for word in usual for name in columns if name.lower() == word]
    if not found:
        raise ConfigError(f"--{role} is missing: which of the columns {listing(list(columns), 12)}?")
    return found[0]


def _modality(values: Sequence[str]) -> str:
    endings = {Path(value).suffix.lower() for value in values}
    if all(value.lower().endswith(VOLUMES) for value in values):
        return "volume"
    return "image" if endings <= set(IMAGES) else "text"


def _kind(labels: Sequence[Any], modality: str) -> str:
    """Kind of the task: by whether labels are files of masks, many different numbers, long texts, or a few words."""
    texts = [str(label) for label in labels]
    if modality == "volume" and all(text.lower().endswith(VOLUMES) for text in texts):
        raise ConfigError(
            "masks: start from swin_unetr.toml, since a segmentation needs the names of its classes (docs/models.md)"
        )
    try:
        numbers = {float(text) for text in texts}
    except ValueError:
        numbers = set()
    if len(numbers) > 20:
        return "regression"
    answers = modality == "text" and len(set(texts)) > max(20, len(texts) / 2)
    return "causal_lm" if answers else "single_label"


def _model_of(given: str | None, modality: str, kind: str) -> list[str]:
    """Lines of `[model]`.

    Raises:
        ConfigError: no model can be proposed for volumes, or for answers.
    """
    if kind == "causal_lm":
        if given is None:
            raise ConfigError("--model is missing: a folder of transformers with a decoder, since the labels are answers")
        return ['build = "transformers.AutoModelForCausalLM"', f"weights = {json.dumps(given)}", "head = []"]
    if given in ("dinov2_small", "minilm") or (given is None and modality != "volume"):
        name = given or {"image": "dinov2_small", "text": "minilm"}[modality]
        size = (
            ["image_size = 112            # a multiple of 14; larger is slower and often better"] if name != "minilm" else []
        )
        return [f'name = "{name}"', *size]
    if modality == "volume":
        raise ConfigError(
            "volumes: start from swin_unetr.toml, since their models need weights of your own (docs/models.md)"
        )
    features, size = ("mean", []) if modality == "text" else ("cls", ["image_size = 224"])
    lines = ['build = "transformers.AutoModel"', f"weights = {json.dumps(given)}", f'features = "{features}"', *size]
    return lines


def _has_monai() -> bool:
    from importlib.util import find_spec

    return find_spec("monai") is not None
