"""A finished run's model for other programs: a class of transformers with its head, or an ONNX file.

Each export is compared with the run's model on random inputs before anything is written.
"""

from __future__ import annotations

import copy
import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config.schema import Config
from ..engines.meta import Materialiser
from ..errors import ConfigError, DataError, line_of, listing
from ..models.example_inputs import example_inputs, reads_tokens
from ..models.pretrained import Classifier, Pretrained, output_of
from ..train.task_model import build_for_task

log = logging.getLogger(__name__)

_LENGTH = 12  # tokens of the random texts
_AS_IT_IS = "Use the run's folder `model`, and the head beside it"


def adapted_model(config: Config, facts: Mapping[str, Any], adapted: Path) -> Pretrained:
    """The run's exported model, whole, on the CPU, in eval mode.

    Args:
        config: configuration of the run.
        facts: what the objective needs to know of the training labels; see `objectives.make.label_facts`.
        adapted: folder with the exported model.

    Raises:
        CheckpointError: the export is damaged, or belongs to another model.
    """
    _, pretrained = build_for_task(config, facts)
    Materialiser(torch.device("cpu"))(pretrained.module)
    pretrained.load(pretrained.module, adapted)
    pretrained.module.eval()
    return pretrained


# -- transformers ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def export_to_transformers(pretrained: Pretrained, config: Config, facts: Mapping[str, Any], folder: Path) -> str:
    """Writes body and head as one class of transformers: `AutoModelForImageClassification`, or that of sequences.

    Args:
        pretrained: the run's model; see `adapted_model`.
        config: configuration of the run.
        facts: of the training labels; a standardised number becomes one in the labels' unit.
        folder: folder to write.

    Returns:
        Name of the class.

    Raises:
        ConfigError: the model is not of transformers, has its own head, or transformers' class computes something else.
    """
    module = pretrained.module
    body: Any = getattr(module, "backbone", None)
    if not isinstance(module, Classifier) or not hasattr(body, "base_model_prefix"):
        raise ConfigError("--to transformers is for a model of transformers with a head of `model.features`; other exports "
                          "are in the run's folder `model` already, as their library reads them")  # fmt: skip
    target = _empty(module, config, facts)
    name, base = type(target).__name__, getattr(target, target.base_model_prefix)
    missing, unexpected = base.load_state_dict(body.state_dict(), strict=False)
    inside = {id(p) for p in base.parameters()}
    outside = {name: p for name, p in target.named_parameters() if id(p) not in inside}
    if unexpected or missing or sorted(p.ndim for p in outside.values()) != [1, 2]:
        odd = listing([*missing, *unexpected] or list(outside), 3)
        raise ConfigError(f"{name} is not this run's body with a linear head ({odd}). {_AS_IT_IS}")
    bias, weight = sorted(outside.values(), key=Tensor.dim)
    head, inputs = _head(module.head, facts), example_inputs(config, module, 2, _LENGTH)
    expected, width = head(_features(module, inputs)), head.in_features
    for start in range(0, weight.shape[1] - width + 1, width):  # DINOv2's head reads the first token and a mean
        weight.zero_()
        weight[:, start : start + width].copy_(head.weight)
        bias.copy_(head.bias)
        if torch.allclose(target(**inputs).logits, expected, rtol=1e-4, atol=1e-5):
            target.save_pretrained(folder)
            pretrained.processor.save(folder)
            return name
    features = config.model.features or "its default"
    raise ConfigError(f"{name} gives other outputs than a head with model.features = {features}. {_AS_IT_IS}")


def _head(head: nn.Linear, facts: Mapping[str, Any]) -> nn.Linear:
    """The head; that of a regression in the unit of the labels."""
    found = copy.deepcopy(head)
    if (std := facts.get("std")) is not None:
        found.weight.mul_(std)
        found.bias.mul_(std).add_(facts["mean"])
    return found


def _features(module: Classifier, inputs: Mapping[str, Tensor]) -> Tensor:
    found: list[Tensor] = []
    hook = module.head.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    module(**inputs)
    hook.remove()
    return found[0]


def _empty(module: Classifier, config: Config, facts: Mapping[str, Any]) -> Any:
    """transformers' class for the body with a head, with random weights."""
    import transformers

    text = reads_tokens(config, module)
    auto: Any = transformers.AutoModelForSequenceClassification if text else transformers.AutoModelForImageClassification
    names = list(facts["names"])
    body: Any = module.backbone
    settings = copy.deepcopy(body.config)
    settings.id2label, settings.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    settings.problem_type = {"multi_label": "multi_label_classification", "regression": "regression"}.get(
        config.task.kind, "single_label_classification"
    )
    try:
        with torch.random.fork_rng():
            return auto.from_config(settings).eval()
    except ValueError as error:
        raise ConfigError(
            f"transformers has no {auto.__name__} for a {type(module.backbone).__name__}: {line_of(error)}"
        ) from error


# -- ONNX --------------------------------------------------------------------------------------------------------------


class _Positional(nn.Module):
    """The model with inputs by position, as ONNX has them, and with numbers in the unit of the labels."""

    def __init__(self, module: nn.Module, names: list[str], facts: Mapping[str, Any]) -> None:
        super().__init__()
        self.module, self._names = module, names
        self._unit: tuple[float, float] | None = (facts["std"], facts["mean"]) if "std" in facts else None

    def forward(self, *values: Tensor) -> Tensor:
        found = output_of(self.module(**dict(zip(self._names, values, strict=True))), "logits")
        return found if self._unit is None else found * self._unit[0] + self._unit[1]


@torch.no_grad()
def export_to_onnx(pretrained: Pretrained, config: Config, facts: Mapping[str, Any], file: Path) -> list[str]:
    """Writes the model as an ONNX file for batches of any size, with its weights in it or in a file beside it.

    Args:
        pretrained: the run's model; see `adapted_model`.
        config: configuration of the run.
        facts: of the training labels; a standardised number becomes one in the labels' unit.
        file: file to write, which ends with `.onnx`.

    Returns:
        Names of the inputs. The output is called `outputs`.

    Raises:
        ConfigError: the shapes of the inputs are not known, the model cannot be exported, or the exported one gives other
            outputs.
        DataError: a package is missing.
    """
    if config.data.modality == "own":
        raise ConfigError("--to onnx: the shapes of inputs made by data.collate are not known")
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise DataError("--to onnx needs more packages: pip install 'dcft_dist[onnx]'") from error
    inputs = example_inputs(config, pretrained.module, 3, _LENGTH)
    model, values = _Positional(pretrained.module, list(inputs), facts).eval(), tuple(inputs.values())
    text = "input_ids" in inputs
    sizes = tuple({0: torch.export.Dim("size"), **({1: torch.export.Dim("tokens")} if text else {})} for _ in values)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{file.name}.", suffix=".tmp", dir=file.parent))
    try:
        torch.onnx.export(
            model,
            values,
            temporary / file.name,
            input_names=list(inputs),
            output_names=["outputs"],
            dynamic_shapes={"values": sizes},
            dynamo=True,
            verbose=False,
        )
        session = onnxruntime.InferenceSession(temporary / file.name, providers=["CPUExecutionProvider"])
        for number in (3, 1):
            some = {name: value[:number] for name, value in inputs.items()}
            (found,) = session.run(["outputs"], {name: value.numpy() for name, value in some.items()})
            torch.testing.assert_close(torch.from_numpy(found), model(*some.values()), rtol=1e-3, atol=1e-4)
    except AssertionError as error:
        raise ConfigError(f"--to onnx: the exported model gives other outputs: {line_of(error)}") from error
    except Exception as error:
        raise ConfigError(f"--to onnx: the model cannot be exported: {type(error).__name__}: {line_of(error)}") from error
    else:
        for part in temporary.iterdir():
            part.replace(file.parent / part.name)
    finally:
        shutil.rmtree(temporary)
    return list(inputs)
