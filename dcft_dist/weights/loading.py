"""Loads pre-trained weights into a model that is already sharded: each rank reads only its shards.

Every difference between file and model is an error, unless the configuration allows it by name. So no part of the body
silently stays random.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.pytorch import persistent_buffers
from ..distributed import collectives
from ..engines.find import find_engine
from ..engines.meta import Materialiser
from ..engines.names import ParameterNames
from ..engines.whole_tensors import cells, fill_shard
from ..errors import CheckpointError, listing
from ..seeds import seed_of
from .resize import Shape, can_resize, check_resize, resized
from .weight_files import RowBlock, TensorSlice, WeightFiles

_COUNTERS = "num_batches_tracked"  # of batch normalisation; unused if its momentum is a number


# names in the file -> for each of them its names in the model
Translate = Callable[[Iterable[str]], Mapping[str, Sequence[str]]]


@dataclass(frozen=True)
class Allowed:
    """Patterns of names at which file and model may differ.

    Attributes:
        head: weights of the model that are newly initialised, even if the file has them.
        new: weights of the model that the file need not have; they are newly initialised if it has not.
        unused: tensors of the file that the model has no place for.
        resize: position embeddings of the model that may have another length in the file.
    """

    head: tuple[str, ...] = ()
    new: Sequence[str] = ()
    unused: Sequence[str] = ()
    resize: Sequence[str] = ()


@dataclass
class LoadReport:
    """What happened to each tensor.

    Attributes:
        matched: weights and buffers of the model that are read unchanged.
        fresh: weights of the model that are newly initialised.
        resized: position embeddings of the model -> [shape in the file, shape in the model].
        unused: tensors of the file that are not read.
    """

    matched: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    resized: dict[str, list[list[int]]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} tensors read"]
        groups = ("newly initialised", self.fresh), ("resized", list(self.resized)), ("not used", self.unused)
        for outcome, names in groups:
            parts += [f"{len(names)} {outcome} ({listing(names, 4)})"] if names else []
        return "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The report as a dictionary of its attributes."""
        return asdict(self)


class Loading:
    """Reads pre-trained weights into a model. Making one compares file and model, before the model is sharded.

    Attributes:
        place: the file or folder.
        report: what happens to each tensor.
    """

    def __init__(
        self,
        module: nn.Module,
        place: Path,
        *,
        allowed: Allowed,
        part: str | None = None,
        rename: Mapping[str, str] | None = None,
        translate: Translate | None = None,
        prefix: str = "",
        seed: int = 0,
    ) -> None:
        """
        Args:
            module: the model before it is wrapped; its weights may be on the meta device.
            place: file or folder with the weights; see `WeightFiles`.
            allowed: differences between file and model that are not errors.
            part: the module is this submodule of the model in the file. Only names that begin with it count, without it; if
                no name does, all names count.
            rename: prefix of names in the file -> prefix in the model; the longest fitting prefix is replaced.
            translate: renames further, for files of a library that renames tensors itself. A name may become several: the
                tensor is then cut into as many equal parts of its rows. It may become none: the library merges that tensor.
            prefix: put before all names at the end, for a model that is a submodule of another.
            seed: seed of new weights, which depend only on it and on their names.

        Raises:
            CheckpointError: weights are missing, unexpected or of another shape, and not allowed; the message names them.
        """
        self.place = place
        names = ParameterNames.of(module)
        shapes = {n: tuple(names.parameters[c].shape) for n, c in names.aliases.items()}
        shapes |= {n: tuple(b.shape) for n, b in persistent_buffers(module).items()}
        with WeightFiles(place) as stored:
            self._source = _names(stored, part, rename or {}, translate, prefix)
            self.report = _compare(stored, self._source, shapes, names.aliases, allowed, prefix)
        read = {names.aliases.get(name) for name in self.report.matched}
        tied = [name for name in self.report.fresh if names.aliases.get(name, "") in read]
        if tied:
            raise CheckpointError(
                f"{listing(tied)} would be newly initialised, but is tied to pre-trained weights: set model.head = []"
            )
        self._shapes = shapes
        self._fresh = list(_templates(module, [n for n in self.report.fresh if n in names.aliases]))
        self._seed = seed

    def into_whole(self, module: nn.Module, device: torch.device) -> None:
        """Gives the module memory and reads all weights, for engines that do not shard weights. Collective.

        Args:
            module: the model, not wrapped.
            device: where its weights get their memory.

        Raises:
            CheckpointError: a file cannot be read.
        """
        Materialiser(device)(module)
        self.into(module)

    @torch.no_grad()
    def into(self, model: nn.Module, moved: Mapping[str, str] | None = None) -> None:
        """Reads weights and persistent buffers into a model under any engine. Each rank reads its shards. Collective.

        Args:
            model: the wrapped model, with memory.
            moved: name when this object was made -> name now, of weights that have another one since.

        Raises:
            CheckpointError: a file cannot be read.
        """
        engine, now = find_engine(model), moved or {}
        with collectives.agreed(f"read {self.place}"), WeightFiles(self.place) as stored:
            buffers, shards = persistent_buffers(engine.module), {shard.name: shard for shard in engine.shards()}
            for name in (*self.report.matched, *self.report.resized):
                values = stored[self._source[name]]
                if name in self.report.resized:
                    values = TensorSlice(resized(name, values[...], self._shapes[name]))
                if name in buffers:
                    buffers[name].copy_(values[...])
                else:
                    shard = shards[engine.names.aliases[now.get(name, name)]]
                    shard.local.copy_(cells(values, shard.box).view(shard.local.shape))
            for template in self._fresh:  # only one module at a time has whole weights
                for name, whole in _fresh(*template, self._seed).items():
                    fill_shard(shards[engine.names.aliases[name]], whole)
        engine.publish()


def _names(
    stored: WeightFiles, part: str | None, rename: Mapping[str, str], translate: Translate | None, prefix: str
) -> dict[str, str | RowBlock]:
    """Name in the model -> name in the file, or the rows of that tensor.

    Raises:
        CheckpointError: two tensors get the same name in the model, or the library merges some.
    """
    inside = [name for name in stored if part and name.startswith(f"{part}.")]
    renamed = {name: _renamed(name.removeprefix(f"{part}.") if inside else name, rename) for name in inside or stored}
    known = translate(renamed.values()) if translate else {name: [name] for name in renamed.values()}
    merged = [name for name, middle in renamed.items() if not known[middle]]
    if merged:
        raise CheckpointError(
            f"{stored.place}: its library merges or splits {listing(merged, 3)} when it reads them: load the model with "
            "that library once, and save it with save_pretrained(..., save_original_format=False)"
        )
    source: dict[str, str | RowBlock] = {}
    for name, middle in renamed.items():
        parts = len(known[middle])
        source |= {f"{prefix}{new}": RowBlock(name, i, parts) if parts > 1 else name for i, new in enumerate(known[middle])}
    lost = set(renamed) - {_tensor(old) for old in source.values()}
    if lost:
        raise CheckpointError(f"{stored.place}: {listing(sorted(lost))} would get the name of another tensor in the model")
    return source


def _tensor(source: str | RowBlock) -> str:
    """The name of a tensor in the file."""
    return source.name if isinstance(source, RowBlock) else source


def _renamed(name: str, rename: Mapping[str, str]) -> str:
    """The name with its longest prefix in `rename` replaced."""
    fitting = [old for old in rename if name.startswith(old)]
    if not fitting:
        return name
    old = max(fitting, key=len)
    return rename[old] + name[len(old) :]


def _compare(
    stored: WeightFiles,
    source: Mapping[str, str | RowBlock],
    shapes: Mapping[str, Shape],
    aliases: Mapping[str, str],
    allowed: Allowed,
    prefix: str,
) -> LoadReport:
    """Decides what to do with each tensor.

    `prefix` begins the names in the model; messages leave it out, as the configuration does.

    Raises:
        CheckpointError: see `Loading`.
    """
    report, wrong = LoadReport(), []
    absent, surplus = list[str](), list[str]()
    known = {aliases.get(name, name) for name in source if name in shapes and not _fits(name, allowed.head)}
    for name, shape in shapes.items():
        if _fits(name, allowed.head):
            report.fresh.append(name)
        elif name not in source:
            if aliases.get(name, name) in known:  # tied to a weight that the file has
                continue
            if _fits(name, allowed.new) or name.endswith(_COUNTERS):
                report.fresh.append(name)
            else:
                absent.append(name.removeprefix(prefix))
                wrong.append(f"no {absent[-1]}")
        elif (stored_shape := stored.shape(source[name])) == shape:
            report.matched.append(name)
        elif _fits(name, allowed.resize):
            check_resize(name, stored_shape, shape)
            report.resized[name] = [list(stored_shape), list(shape)]
        else:
            resize_key = f": model.resize = ['{name.removeprefix(prefix)}'] interpolates it"
            hint = resize_key if can_resize(name, stored_shape, shape) else ""
            wrong.append(f"{source[name]} is {list(stored_shape)} in the file and {list(shape)} in the model{hint}")
    for name, old in source.items():
        if name not in shapes or _fits(name, allowed.head):
            report.unused.append(str(old))
            if name not in shapes and not _fits(_tensor(old), allowed.unused):
                surplus.append(_tensor(old))
                wrong.append(f"{old} has no place in the model")
    if wrong:
        advice = _renaming(source, shapes, prefix) or _keys(absent, surplus)
        raise CheckpointError(f"{stored.place} does not fit the model: {listing(wrong)}{advice}")
    return report


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*") for p in patterns)


def _renaming(source: Iterable[str], shapes: Mapping[str, Shape], prefix: str) -> str:
    """Advice for an error message: a prefix that would make most names fit; empty if there is none."""
    in_model, in_file = ({name.removeprefix(prefix) for name in names} for names in (shapes, source))
    unknown, missing = sorted(in_file - in_model), sorted(in_model - in_file)
    for old in dict.fromkeys(f"{name.split('.')[0]}." for name in unknown):
        rest = [name.removeprefix(old) for name in unknown if name.startswith(old)]
        if sum(name in in_model for name in rest) > len(rest) / 2:
            return f'; model.rename = {{"{old}" = ""}} would make most names fit'
    for new in dict.fromkeys(f"{name.split('.')[0]}." for name in missing):
        if sum(new + name in in_model for name in unknown) > len(unknown) / 2:
            return f'; model.rename = {{"" = "{new}"}} would make most names fit'
    return ""


def _keys(absent: Sequence[str], surplus: Sequence[str]) -> str:
    """Advice for an error message: the lines that allow these differences; without them if they were long."""
    lines = []
    for key, names, effect in (("new", absent, "draws it from the seed"), ("unused", surplus, "leaves it out")):
        modules = dict.fromkeys(f"{path}.*" if path else name for name in names for path in [name.rpartition(".")[0]])
        if 0 < len(modules) <= 4:
            lines.append(f"{key} = [{', '.join(map(json.dumps, modules))}] {effect}")
    return f"; in [model], {'; '.join(lines)}" if lines else "; model.new, model.unused and model.rename say what may differ"


# -- new weights ---------------------------------------------------------------------------------------------------------


def _templates(module: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, nn.Module, list[str]]]:
    """(path, copy of the module without memory, names of its weights) of each module that owns some of these weights."""
    owners: dict[str, list[str]] = {}
    for name in names:
        owners.setdefault(name.rpartition(".")[0], []).append(name)
    for path, owned in owners.items():
        yield path, copy.deepcopy(module.get_submodule(path)), owned


def _fresh(path: str, template: nn.Module, names: Sequence[str], seed: int) -> dict[str, Tensor]:
    """Whole values of new weights, as their module resets them.

    For a module without `reset_parameters`, matrices are small and random, scales are 1, and biases are 0.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(seed, path, bits=63))
        values = _reset(template)
    return {name: values[name.rpartition(".")[2]].detach() for name in names}


def _reset(module: nn.Module) -> dict[str, Tensor]:
    """New values of a module's own parameters. The module itself stays unchanged."""
    copied = copy.deepcopy(module)
    Materialiser(torch.device("cpu")).one(copied)
    fields: dict[str, Tensor] = dict(copied.named_parameters(recurse=False, remove_duplicate=False))
    for slot, parameter in fields.items():
        if parameter.ndim > 1:
            nn.init.trunc_normal_(parameter, std=0.02)
        else:
            nn.init.constant_(parameter, float(slot == "weight"))  # a vector called `weight` is the scale of a norm
    if callable(reset := getattr(copied, "reset_parameters", None)):
        reset()
    return fields
