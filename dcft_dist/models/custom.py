"""The user's model: `[model]` with `build`, `args` and `weights`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..compat.transformers import names_in_transformers
from ..config.model import Model
from ..config.schema import Config
from ..data.batches import Processor
from ..data.text import AnswerProcessor, TextProcessor, pad_id
from ..engines.meta import on_meta
from ..errors import ConfigError, did_you_mean, listing
from ..imports import find_object
from ..weights.loading import Allowed, Loading, Translate
from ..weights.weight_files import missing_weights_advice
from .pretrained import HEAD, Classifier, ExportPart, Pretrained, find_blocks

_OBJECT = "object:"


_HEADS = ("head", "classifier", "fc", "score")  # of timm, transformers, torchvision


_DECODERS = {  # of MONAI: what the pre-training of the encoder leaves random
    "SwinUNETR": ("encoder*", "decoder*", "out"),
    "UNETR": ("encoder*", "decoder*", "out"),
    "SegResNet": ("up_layers", "up_samples", "conv_final"),
}


_WIDTHS = ("hidden_size", "num_features", "embed_dim", "hidden_dim")


def custom_model(config: Config, num_outputs: int, processor: Processor, *, read: bool = True) -> Pretrained:
    """`read`: otherwise the model is only built, and its weights are not looked for (`dcft plan`).

    Raises:
        ConfigError: the model cannot be built, or keys of `[model]` do not fit it.
        CheckpointError: its weights do not fit it (see `Loading`).
    """
    settings = config.model
    reads = read and settings.weights is not None
    has_weights = settings.weights is None and read  # the callable itself gives a model with its weights
    with nullcontext() if has_weights else on_meta(), torch.random.fork_rng():
        torch.manual_seed(config.seed)
        built = _part(_build(config, num_outputs, processor), settings.part)
        module: nn.Module = built
        if settings.features:
            module = Classifier(built, settings.features, settings.width or _width(built), num_outputs)
    head = (HEAD,) if settings.features else _head(settings, module)
    prefix = "backbone." if settings.features else ""
    loading = None
    if reads:
        allowed = Allowed(
            head=head,
            new=[prefix + p for p in settings.new],
            unused=settings.unused,
            resize=[prefix + p for p in settings.resize],
        )
        place = Path(str(settings.weights))
        loading = Loading(
            module,
            place,
            allowed=allowed,
            part=settings.part,
            rename=settings.rename,
            translate=_translate(built),
            prefix=prefix,
            seed=config.seed,
        )
    return Pretrained(
        module=module,
        head=head,
        blocks=_blocks(settings, module),
        processor=processor,
        loading=loading,
        parts={prefix: ExportPart(".", _stem(built, settings.part) if settings.part else "")}
        | ({f"{HEAD}.": ExportPart(HEAD)} if settings.features else {}),
        describe=_describe(built),
    )


def _build(config: Config, num_outputs: int, processor: Processor) -> nn.Module:
    settings = config.model
    make = find_object(str(settings.build), config.import_roots, "model.build")
    args = {key: _argument(value, num_outputs, config.import_roots) for key, value in settings.args.items()}
    try:
        built = _from_config(make, settings, args) if hasattr(make, "from_config") else make(**args)
    except Exception as error:
        raise ConfigError(f"model.build: {settings.build} fails: {type(error).__name__}: {error}") from error
    if not isinstance(built, nn.Module):
        raise ConfigError(f"model.build: {settings.build} gives a {type(built).__name__}, not a torch.nn.Module")
    _fits_text(getattr(built, "config", None), config, processor)
    _says_float32(getattr(built, "config", None))  # or transformers would read the export as the file was
    return built.float()  # masters in float32, whatever the file has


def _argument(value: Any, num_outputs: int, roots: Sequence[str]) -> Any:
    """`num_outputs`, and what an import path leads to (`object:torch.nn.SiLU`); all else is as it is given."""
    if value == "num_outputs":
        return num_outputs
    if isinstance(value, str) and value.startswith(_OBJECT):
        return find_object(value.removeprefix(_OBJECT), roots, "model.args")
    if isinstance(value, list):
        return [_argument(one, num_outputs, roots) for one in value]
    return {k: _argument(v, num_outputs, roots) for k, v in value.items()} if isinstance(value, dict) else value


def _fits_text(described: Any, config: Config, processor: Processor) -> None:
    """A model of transformers is told which token fills up, if it knows none.

    Raises:
        ConfigError: it has fewer positions than texts may have tokens.
    """
    if not isinstance(processor, TextProcessor | AnswerProcessor):
        return
    positions, tokens = getattr(described, "max_position_embeddings", None), config.task.max_tokens
    if isinstance(positions, int) and tokens > positions:
        raise ConfigError(f"task.max_tokens = {tokens}, but the model has {positions} positions")
    if hasattr(described, "pad_token_id") and described.pad_token_id is None:
        described.pad_token_id = pad_id(processor.tokenizer)


def _part(built: nn.Module, path: str | None) -> nn.Module:
    if path is None:
        return built
    modules = dict(built.named_modules())
    if path not in modules:
        raise ConfigError(f"model.part: {path!r} is no part of the model{did_you_mean(path, modules)}")
    found: nn.Module = modules[path]
    return found


def _says_float32(config: Any) -> None:
    if getattr(config, "dtype", None) is not None:
        config.dtype = torch.float32
    for name in getattr(config, "sub_configs", None) or ():
        _says_float32(getattr(config, name, None))


def _from_config(make: Any, settings: Model, args: dict[str, Any]) -> Any:
    """A model class of transformers, from the configuration beside its weights."""
    from transformers import AutoConfig

    if settings.weights and not Path(settings.weights).exists():
        raise ConfigError(f"model.weights: {missing_weights_advice(settings.weights)}")
    if not settings.weights or not (Path(settings.weights) / "config.json").is_file():
        raise ConfigError(f"model.weights: {settings.weights} is no folder with a config.json, which {settings.build} needs")
    place = str(settings.weights)
    found, rest = AutoConfig.from_pretrained(place, local_files_only=True, return_unused_kwargs=True, **args)
    return make.from_config(found, **rest)


def _width(module: nn.Module) -> int:
    for holder in (getattr(module, "config", None), module):
        for name in _WIDTHS:
            if isinstance(value := getattr(holder, name, None), int):
                return value
    raise ConfigError("model.width: the model does not say how wide its features are")


def _head(settings: Model, module: nn.Module) -> tuple[str, ...]:
    if settings.head is not None:
        return tuple(settings.head)
    if type(module).__module__.startswith("monai.") and type(module).__name__ in _DECODERS:
        return _DECODERS[type(module).__name__]
    last: Any = getattr(module, "get_classifier", lambda: None)  # of timm
    modules = {id(part): name for name, part in module.named_modules() if next(part.parameters(), None) is not None}
    if name := modules.get(id(last())):
        return (name,)  # ConvNeXt's `head` also holds a norm that is pre-trained
    children = [name for name, child in module.named_children() if next(child.parameters(), None) is not None]
    for name in _HEADS:
        if name in children:
            return (name,)
    raise ConfigError(
        f"model.head: which weights are new for the task? The model has {listing(children)}; [] if none are; "
        "model.features puts a head on it"
    )


def _blocks(settings: Model, module: nn.Module) -> list[nn.Module]:
    if settings.blocks is None:
        return find_blocks(module)
    modules = dict(module.named_modules())
    for pattern in settings.blocks:
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise ConfigError(f"model.blocks: {pattern!r} matches no module{did_you_mean(pattern, modules)}")
    return [m for name, m in modules.items() if any(fnmatchcase(name, pattern) for pattern in settings.blocks)]


def _translate(built: nn.Module) -> Translate | None:
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(built, transformers.PreTrainedModel):
        return None
    return partial(names_in_transformers, built)


def _stem(built: nn.Module, part: str) -> str:
    """What transformers' class for a part's configuration puts before its names, such as `vision_encoder.`.

    Where several would do, as the decoder of an encoder and decoder has all names of the encoder, the one that the part is
    called by. "" where there is none: such parts are read by `load_state_dict`.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(built, transformers.PreTrainedModel):
        return ""
    try:
        with on_meta():
            known = set(transformers.AutoModel.from_config(built.config).state_dict())
    except ValueError:  # there is no such class
        return ""
    names = list(built.state_dict())
    ends = sorted(name.removesuffix(names[0]) for name in known if name.endswith(names[0]))
    stems = [stem for stem in ends if all(stem + name in known for name in names)]
    return next((stem for stem in stems if stem and f".{part}.".endswith(f".{stem}")), stems[0] if len(stems) == 1 else "")


def _describe(built: nn.Module) -> Callable[[Path], None]:
    """transformers' models are read again with their configuration."""
    save = getattr(getattr(built, "config", None), "save_pretrained", None)
    return save if callable(save) else lambda folder: None
