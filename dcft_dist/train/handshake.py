"""What all ranks of a start must share, and all starts of a run: configuration, code, packages, data, splits, weights.

No fact depends on local paths or on the number of ranks. See `distributed.handshake` and `runs.facts`, which compare facts.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from ..config.schema import Config
from ..config.toml import resolved_keys
from ..data.contents import Contents, stamp_of
from ..data.hashes import hash_of
from ..data.splits import Split, TaskData, content_of
from ..distributed import collectives
from ..distributed.handshake import digest_of, require_equal, same_view
from ..engines.checksum import own_checksums, weight_checksums
from ..runs.facts import compare_with_first_start, note_start
from ..runs.folder import RunFolder
from ..runs.provenance import versions

Facts = dict[str, str]

# Files beside weights that are read: tensors, configurations, vocabularies.
_READ = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".onnx", ".json", ".txt", ".model")


def greet(config: Config) -> None:
    """Compares configuration, code and packages of all ranks, before they do anything else. Collective.

    Raises:
        MismatchError: a rank differs; the message names it, and the first key that does.
    """
    require_equal({**resolved_keys(config), **code_facts()}, "configuration")


@cache
def code_facts() -> Facts:
    """Versions of the packages, and a digest of this package's own files, whatever folder they lie in."""
    root = Path(__file__).parents[1]
    files = sorted((file.relative_to(root).as_posix(), file) for file in root.rglob("*.py"))
    digest = digest_of([(name, hashlib.sha256(file.read_bytes()).hexdigest()) for name, file in files])
    return {f"version of {name}": number for name, number in versions().items()} | {"code of dcft_dist": digest}


def compare_data(config: Config, task: TaskData, contents: Contents, folder: RunFolder) -> Facts:
    """Compares classes, splits and contents of the data over all ranks, and with what earlier starts have read. Collective.

    Ranks of one host that see the same paths share the work.

    Args:
        config: configuration of the run.
        task: the data.
        contents: their files; gets their stamps.
        folder: the run's directory.

    Raises:
        MismatchError: the ranks have different data, or the run was begun with other data.
        DataError: a file was changed since an earlier start.
    """
    with collectives.agreed("classes, labels and inputs"):
        facts = {**_code_of_the_user(config), "list of classes": digest_of(task.class_names)}
        for name, split in task.splits.items():
            facts |= _facts_of(name, split)
    require_equal(facts, "data")
    paths = digest_of([(key, str(file.resolve())) for key, file in contents.files.items()])
    position, number, views = same_view(paths)
    with collectives.agreed("data of earlier starts"):
        compare_with_first_start(folder.facts, facts)
        if collectives.rank() == 0:
            contents.compact()
    with collectives.agreed("contents of the data"):
        contents.load()
        sums = contents.stamp(position, number)
        if views[collectives.rank()] == 0:
            contents.keep(f"now-{position:05}")
    parts = sorted({key.split("/")[0] for key in contents.files})
    rows = collectives.all_gather_ints([sums.get(part, 0) for part in parts], what="contents of the data")
    here = [row for row, view in zip(rows, views, strict=True) if view == views[collectives.rank()]]
    files = {f"content of the {part} files": digest_of(sum(row[i] for row in here)) for i, part in enumerate(parts)}
    require_equal(files, "data")
    return facts | files


def read_contents(contents: Contents) -> None:
    """Takes the whole hashes of all files that are not known yet; each rank reads its part. Collective.

    Raises:
        DataError: a file is not the one that was read first.
    """
    with collectives.agreed("contents of the data"):
        if contents.read_all(collectives.rank(), collectives.world_size()):
            contents.keep(f"read-{collectives.rank():05}")
    with collectives.agreed("contents of the data"):
        contents.load()  # what the other ranks have hashed


def compare_weights(place: Path | None, module: nn.Module, whole: bool) -> None:
    """Compares initial weights over ranks: by their values while each rank has all of them, otherwise by files. Collective.

    Args:
        place: file or folder of the weights; None: the model was built with its weights.
        module: the plain model.
        whole: whether this rank has the values of all weights.

    Raises:
        MismatchError: a rank has other weights.
    """
    facts = {}
    with collectives.agreed("files of the weights"):
        found = sorted(place.iterdir()) if place is not None and place.is_dir() else [place] if place is not None else []
        for file in (file for file in found if file.is_file() and file.suffix in _READ):
            stamp = stamp_of(file)
            facts[f"content of the weights file {file.name}"] = digest_of(stamp.size, stamp.ends)
    if whole:
        facts |= _weight_facts(own_checksums(module))
    require_equal(facts, "initial weights")


def compare_starts(folder: RunFolder, model: nn.Module, config: Config, facts: Facts) -> None:
    """Compares a start with the run's first one, and writes down what it has. Collective.

    Args:
        folder: the run's directory.
        model: the wrapped model with its initial weights.
        config: its engine is part of the names of weights, since an engine may store them in another precision.
        facts: code, packages and data.

    Raises:
        MismatchError: data or weights are not those of the first start.
    """
    engine = f"{config.engine}{config.sharding.zero_stage}" if config.engine == "deepspeed" else config.engine
    weights = {f"{key} ({engine})": value for key, value in _weight_facts(weight_checksums(model)).items()}
    facts = facts | weights
    with collectives.agreed("comparison with earlier starts"):
        changes = compare_with_first_start(folder.facts, facts)
    with collectives.agreed("facts of the run"):
        if collectives.rank() == 0:
            note_start(folder.facts, facts, changes)


def _weight_facts(sums: Mapping[str, int]) -> Facts:
    return {f"initial value of {name}": f"#{value:x}" for name, value in sums.items()}


def _facts_of(name: str, split: Split) -> Facts:
    """Groups are compared by who is together, since the name of a group may be a path."""
    numbers: dict[str, int] = {}
    groups = [numbers.setdefault(group, len(numbers)) for group in split.groups]
    return {
        f"number of {name} examples": str(len(split)),
        f"sequence of {name} inputs": digest_of(content_of(split.inputs)),
        f"sequence of {name} labels": digest_of(content_of(split.labels)),
        f"grouping of {name} examples": digest_of(groups),
    }


def _code_of_the_user(config: Config) -> Facts:
    """The modules in `import_roots` that the configuration names, such as that of `model.build`."""
    roots = [Path(root).resolve() for root in config.import_roots]
    names = {name for text in _texts(config.model_dump()) for name in _parents(text)}
    places = {name: getattr(sys.modules.get(name), "__file__", None) for name in names}
    files = {name: Path(place).resolve() for name, place in places.items() if place}
    own = {name: file for name, file in files.items() if any(file.is_relative_to(root) for root in roots)}
    return {f"code of {name}": "#" + hash_of(file, whole=True) for name, file in sorted(own.items())}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(part)


def _parents(path: str) -> list[str]:
    """Names of the modules that an import path may stand in."""
    parts = path.replace(":", ".").split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
