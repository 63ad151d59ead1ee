"""Pre-trained weights into a model that is sharded already: each rank reads only what it holds.

What the file and the model do not have in common is an error unless it was allowed by name, so that a body never stays
random in silence.
"""

from __future__ import annotations

import copy
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

_COUNTERS = "num_batches_tracked"  # of batch normalisation: nothing uses them where the momentum is given


Translate = Callable[[Iterable[str]], Mapping[str, Sequence[str]]]


@dataclass(frozen=True)
class Allowed:
    """Patterns of names that may differ: `head` starts afresh, whatever the file has of it; `new` the file need not have;
    `unused` the model has no place for; `resize` are position embeddings that may have another length."""

    head: tuple[str, ...] = ()
    new: Sequence[str] = ()
    unused: Sequence[str] = ()
    resize: Sequence[str] = ()


@dataclass
class LoadReport:
    """What became of each tensor: names in the model, except `unused`, which has those in the file."""

    matched: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    resized: dict[str, list[list[int]]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} tensors read"]
        for what, names in (("started afresh", self.fresh), ("resized", list(self.resized)), ("left aside", self.unused)):
            parts += [f"{len(names)} {what} ({listing(names, 4)})"] if names else []
        return "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Loading:
    """What is to be read into a model: found out, and checked, before it is sharded."""

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
            place: see `WeightFiles`.
            part: the module is this part of what the file holds: names that begin so count, without that, and all others are
                left aside; all count where none begins so.
            rename: prefix of names in the file -> prefix in the model; the longest that fits.
            translate: names after that -> names in the model, for files of a library that has its own (several: of equal
                parts of the rows; none: it cannot).
            prefix: put before all names then, for a model that is part of another.
            seed: new weights are a function of it and their names.

        Raises:
            CheckpointError: weights are missing, unexpected or of another shape, all named, unless they are allowed.
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
            raise CheckpointError(f"{listing(tied)} would start afresh, but is tied to pre-trained weights: model.head = []")
        self._shapes = shapes
        self._fresh = list(_templates(module, [n for n in self.report.fresh if n in names.aliases]))
        self._seed = seed

    def into_whole(self, module: nn.Module, device: torch.device) -> None:
        """For engines that do not shard weights: gives the module memory on the device, and reads it all. Collective."""
        Materialiser(device)(module)
        self.into(module)

    @torch.no_grad()
    def into(self, model: nn.Module) -> None:
        """Reads the weights and persistent buffers into the model, under any engine: each rank what it holds. Collective.

        Raises:
            CheckpointError: a file cannot be read.
        """
        engine = find_engine(model)
        with collectives.agreed(f"read {self.place}"), WeightFiles(self.place) as stored:
            buffers, shards = persistent_buffers(engine.module), {shard.name: shard for shard in engine.shards()}
            for name in (*self.report.matched, *self.report.resized):
                values = stored[self._source[name]]
                if name in self.report.resized:
                    values = TensorSlice(resized(name, values[...], self._shapes[name]))
                if name in buffers:
                    buffers[name].copy_(values[...])
                else:
                    shard = shards[engine.names.aliases[name]]
                    shard.local.copy_(cells(values, shard.box).view(shard.local.shape))
            for template in self._fresh:  # one module at a time is whole
                for name, whole in _fresh(*template, self._seed).items():
                    fill_shard(shards[engine.names.aliases[name]], whole)
        engine.publish()


def _names(
    stored: WeightFiles, part: str | None, rename: Mapping[str, str], translate: Translate | None, prefix: str
) -> dict[str, str | RowBlock]:
    """Name in the model -> name in the file, or which part of that tensor.

    Raises:
        CheckpointError: two tensors would go to one place, or the library merges some.
    """
    inside = [name for name in stored if part and name.startswith(f"{part}.")]
    renamed = {name: _renamed(name.removeprefix(f"{part}.") if inside else name, rename) for name in inside or stored}
    known = translate(renamed.values()) if translate else {name: [name] for name in renamed.values()}
    merged = [name for name, middle in renamed.items() if not known[middle]]
    if merged:
        raise CheckpointError(
            f"{stored.place}: its library merges or splits {listing(merged, 3)} when it reads them: read and save the model "
            "there once with save_pretrained(..., save_original_format=False)"
        )
    source: dict[str, str | RowBlock] = {}
    for name, middle in renamed.items():
        many = len(known[middle])
        source |= {f"{prefix}{new}": RowBlock(name, i, many) if many > 1 else name for i, new in enumerate(known[middle])}
    lost = set(renamed) - {_tensor(old) for old in source.values()}
    if lost:
        raise CheckpointError(f"{stored.place}: {listing(sorted(lost))} would go where another tensor of the file goes")
    return source


def _tensor(source: str | RowBlock) -> str:
    """The name in the file."""
    return source.name if isinstance(source, RowBlock) else source


def _renamed(name: str, rename: Mapping[str, str]) -> str:
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
    """What to do with each tensor. `prefix`: of names in the model, which messages leave out, as the configuration does.

    Raises:
        CheckpointError: see `Loading`.
    """
    report, wrong = LoadReport(), []
    known = {aliases.get(name, name) for name in source if name in shapes and not _fits(name, allowed.head)}
    for name, shape in shapes.items():
        if _fits(name, allowed.head):
            report.fresh.append(name)
        elif name not in source:
            if aliases.get(name, name) in known:  # tied to one that is there
                continue
            if _fits(name, allowed.new) or name.endswith(_COUNTERS):
                report.fresh.append(name)
            else:
                wrong.append(f"no {name.removeprefix(prefix)}")
        elif (found := stored.shape(source[name])) == shape:
            report.matched.append(name)
        elif _fits(name, allowed.resize):
            check_resize(name, found, shape)
            report.resized[name] = [list(found), list(shape)]
        else:
            advice = (
                f": model.resize = ['{name.removeprefix(prefix)}'] interpolates it" if can_resize(name, found, shape) else ""
            )
            wrong.append(f"{source[name]} is {list(found)} there and {list(shape)} in the model{advice}")
    for name, old in source.items():
        if name not in shapes or _fits(name, allowed.head):
            report.unused.append(str(old))
            if name not in shapes and not _fits(_tensor(old), allowed.unused):
                wrong.append(f"{old} has no place in the model")
    if wrong:
        raise CheckpointError(f"{stored.place} does not fit the model: {listing(wrong)}{_advice(source, shapes, prefix)}")
    return report


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*") for p in patterns)


def _advice(source: Iterable[str], shapes: Mapping[str, Shape], prefix: str) -> str:
    """A prefix that would make names fit, if there is one; otherwise which keys allow differences."""
    known, given = ({name.removeprefix(prefix) for name in names} for names in (shapes, source))
    unknown, missing = sorted(given - known), sorted(known - given)
    for old in dict.fromkeys(f"{name.split('.')[0]}." for name in unknown):
        rest = [name.removeprefix(old) for name in unknown if name.startswith(old)]
        if sum(name in known for name in rest) > len(rest) / 2:
            return f'; model.rename = {{"{old}" = ""}} would make most names fit'
    for new in dict.fromkeys(f"{name.split('.')[0]}." for name in missing):
        if sum(new + name in known for name in unknown) > len(unknown) / 2:
            return f'; model.rename = {{"" = "{new}"}} would make most names fit'
    return "; model.new, model.unused and model.rename say what may differ"


# -- what is new ---------------------------------------------------------------------------------------------------------


def _templates(module: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, nn.Module, list[str]]]:
    """(path, the module without memory there, names) of the modules that own these weights."""
    owners: dict[str, list[str]] = {}
    for name in names:
        owners.setdefault(name.rpartition(".")[0], []).append(name)
    for path, wanted in owners.items():
        yield path, copy.deepcopy(module.get_submodule(path)), wanted


def _fresh(path: str, template: nn.Module, names: Sequence[str], seed: int) -> dict[str, Tensor]:
    """Whole values of new weights: as their module resets them; where it cannot, matrices small and random, scales 1,
    biases 0."""
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(seed, path, bits=63))
        values = _reset(template)
    return {name: values[name.rpartition(".")[2]].detach() for name in names}


def _reset(module: nn.Module) -> dict[str, Tensor]:
    """New values of a module's own parameters; the module itself is left as it is."""
    copied = copy.deepcopy(module)
    Materialiser(torch.device("cpu")).one(copied)
    fields: dict[str, Tensor] = dict(copied.named_parameters(recurse=False, remove_duplicate=False))
    for slot, parameter in fields.items():
        if parameter.ndim > 1:
            nn.init.trunc_normal_(parameter, std=0.02)
        else:
            nn.init.constant_(parameter, float(slot == "weight"))  # a vector of that name scales what a norm gives
    if callable(reset := getattr(copied, "reset_parameters", None)):
        reset()
    return fields
