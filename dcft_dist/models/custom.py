"""The user's model, from `build`, `args` and `weights` in the section `[model]`."""

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
from ..packages import local_weights
from ..weights.loading import Allowed, Loading, Translate
from ..weights.weight_files import missing_weights_advice
from .pretrained import HEAD, Classifier, ExportPart, Pretrained, find_blocks

_OBJECT = "object:"


_HEADS = ("head", "classifier", "fc", "score")  # names of the head in timm, transformers and torchvision


_DECODERS = {  # MONAI: the weights that pre-training of the encoder leaves random
    "SwinUNETR": ("encoder*", "decoder*", "out"),
    "UNETR": ("encoder*", "decoder*", "out"),
    "SegResNet": ("up_layers", "up_samples", "conv_final"),
}


_WIDTHS = ("hidden_size", "num_features", "embed_dim", "hidden_dim")


def custom_model(config: Config, num_outputs: int, processor: Processor, *, read: bool = True) -> Pretrained:
    """The user's model with its head, not wrapped.

    With `model.weights` it is on the meta device, and `Pretrained.loading` reads the weights later.

    Args:
        config: configuration of the run; its section `model` is used.
        num_outputs: number of outputs of the head.
        processor: turns a split into inputs of the model.
        read: False: only build the model and ignore its weights (`dcft plan`).

    Raises:
        ConfigError: the model cannot be built, or keys of `[model]` do not fit it.
        CheckpointError: the weights do not fit the model (see `Loading`).
    """
    settings = config.model
    reads = read and settings.weights is not None
    has_weights = settings.weights is None and read  # `build` returns a model with its weights
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
        weights = Path(str(local_weights(settings.weights)))
        loading = Loading(
            module,
            weights,
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
        raise ConfigError(f"model.build: {settings.build} returns a {type(built).__name__}, not a torch.nn.Module")
    _fit_to_text(getattr(built, "config", None), config, processor)
    _set_float32(getattr(built, "config", None))  # or transformers would read the export in the file's old dtype
    return built.float()  # float32 master weights, whatever dtype the file has


def _argument(value: Any, num_outputs: int, roots: Sequence[str]) -> Any:
    """Replaces "num_outputs" by the number and `object:torch.nn.SiLU` by the imported object, also in lists and tables."""
    if value == "num_outputs":
        return num_outputs
    if isinstance(value, str) and value.startswith(_OBJECT):
        return find_object(value.removeprefix(_OBJECT), roots, "model.args")
    if isinstance(value, list):
        return [_argument(item, num_outputs, roots) for item in value]
    return {k: _argument(v, num_outputs, roots) for k, v in value.items()} if isinstance(value, dict) else value


def _fit_to_text(model_config: Any, config: Config, processor: Processor) -> None:
    """Sets the padding token in the configuration of a transformers model, if it has none.

    Raises:
        ConfigError: the model has fewer positions than texts may have tokens.
    """
    if not isinstance(processor, TextProcessor | AnswerProcessor):
        return
    positions, tokens = getattr(model_config, "max_position_embeddings", None), config.task.max_tokens
    if isinstance(positions, int) and tokens > positions:
        raise ConfigError(f"task.max_tokens = {tokens}, but the model has {positions} positions")
    if hasattr(model_config, "pad_token_id") and model_config.pad_token_id is None:
        model_config.pad_token_id = pad_id(processor.tokenizer)


def _part(built: nn.Module, path: str | None) -> nn.Module:
    """The submodule at `model.part`, or the whole model."""
    if path is None:
        return built
    modules = dict(built.named_modules())
    if path not in modules:
        raise ConfigError(f"model.part: {path!r} is not a submodule of the model{did_you_mean(path, modules)}")
    part: nn.Module = modules[path]
    return part


def _set_float32(config: Any) -> None:
    """Sets the dtype to float32 in a configuration of transformers, and in its parts."""
    if getattr(config, "dtype", None) is not None:
        config.dtype = torch.float32
    for name in getattr(config, "sub_configs", None) or ():
        _set_float32(getattr(config, name, None))


def _from_config(make: Any, settings: Model, args: dict[str, Any]) -> Any:
    """Builds a model class of transformers from the configuration in the folder of its weights."""
    from transformers import AutoConfig

    place = local_weights(settings.weights)
    if place and not Path(place).exists():
        raise ConfigError(f"model.weights: {missing_weights_advice(place)}")
    if not place or not (Path(place) / "config.json").is_file():
        raise ConfigError(f"model.weights: {settings.build} needs a folder with a config.json, not {settings.weights}")
    folder = place
    trust = bool(args.pop("trust_remote_code", False))  # without a value, transformers would ask, also where nobody sits
    options = {"local_files_only": True, "return_unused_kwargs": True, "trust_remote_code": trust}
    config, other_args = AutoConfig.from_pretrained(folder, **options, **args)
    if getattr(make, "__module__", "").startswith("transformers.models.auto."):
        other_args["trust_remote_code"] = trust
    return make.from_config(config, **other_args)


def _width(module: nn.Module) -> int:
    """Width of the features, as the model or its configuration says it."""
    for holder in (getattr(module, "config", None), module):
        for name in _WIDTHS:
            if isinstance(value := getattr(holder, name, None), int):
                return value
    raise ConfigError("model.width: the model does not say how wide its features are: give the number")


def _head(settings: Model, module: nn.Module) -> tuple[str, ...]:
    """Patterns of the head's weights: `model.head`, or the usual names of a head."""
    if settings.head is not None:
        return tuple(settings.head)
    if type(module).__module__.startswith("monai.") and type(module).__name__ in _DECODERS:
        return _DECODERS[type(module).__name__]
    get_classifier: Any = getattr(module, "get_classifier", lambda: None)  # of timm
    modules = {id(part): name for name, part in module.named_modules() if next(part.parameters(), None) is not None}
    if name := modules.get(id(get_classifier())):
        return (name,)  # not `head`, which in ConvNeXt also has a pre-trained norm
    children = [name for name, child in module.named_children() if next(child.parameters(), None) is not None]
    for name in _HEADS:
        if name in children:
            return (name,)
    deeper = [
        f"{name}.{inner}"
        for name in children
        for inner, part in module.get_submodule(name).named_children()
        if next(part.parameters(), None) is not None
    ]
    last = (deeper or children or ["name"])[-1]
    raise ConfigError(
        f"model.head: no head found among {listing(children)}; inside them are {listing(deeper, 12)}. Name the weights that "
        f'are new for the task, as in [model] head = ["{last}"] ([] for none), or set model.features to put a new head on'
    )


def _blocks(settings: Model, module: nn.Module) -> list[nn.Module]:
    """The modules to shard one by one: those that `model.blocks` names, or the repeated layers."""
    if settings.blocks is None:
        return find_blocks(module)
    modules = dict(module.named_modules())
    for pattern in settings.blocks:
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise ConfigError(f"model.blocks: {pattern!r} matches no module{did_you_mean(pattern, modules)}")
    return [m for name, m in modules.items() if any(fnmatchcase(name, pattern) for pattern in settings.blocks)]


def _translate(built: nn.Module) -> Translate | None:
    """How transformers renames the tensors of a file for this model; None for models of other libraries."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(built, transformers.PreTrainedModel):
        return None
    return partial(names_in_transformers, built)


def _stem(built: nn.Module, part: str) -> str:
    """The prefix that an export of a part needs before its names, such as `vision_encoder.`.

    It is the prefix in transformers' class for the part's configuration. Several prefixes may fit, as a decoder may have all
    names of the encoder: then it is the one that `part` ends with. "" if there is none: `load_state_dict` reads such
    exports.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(built, transformers.PreTrainedModel):
        return ""
    try:
        with on_meta():
            known = set(transformers.AutoModel.from_config(built.config).state_dict())
    except ValueError:  # transformers has no class for this configuration
        return ""
    names = list(built.state_dict())
    ends = sorted(name.removesuffix(names[0]) for name in known if name.endswith(names[0]))
    stems = [stem for stem in ends if all(stem + name in known for name in names)]
    return next((stem for stem in stems if stem and f".{part}.".endswith(f".{stem}")), stems[0] if len(stems) == 1 else "")


def _describe(built: nn.Module) -> Callable[[Path], None]:
    """Writes the configuration that transformers needs to read an export of its models; nothing for other models."""
    save = getattr(getattr(built, "config", None), "save_pretrained", None)
    return save if callable(save) else lambda folder: None
