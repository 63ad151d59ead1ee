"""Splits the layers of a model over ranks that compute together: torch's tensor parallelism, by the plan of the model.

Models of transformers bring a plan (`tp_plan`): which layers are split by rows, and which by columns. Every other weight is
replicated over these ranks. So each weight is a DTensor over the same mesh, and FSDP2 shards it further.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.utils._pytree import tree_map

from ..compat.pytorch import AsyncCollectiveTensor
from ..errors import EngineError, listing

_KEY = "sharding.tensor_parallel"


class _Whole(ParallelStyle):
    """Replicates the weights of a module. Its inputs are equal on all ranks, or different heads if `of_heads`."""

    def __init__(self, of_heads: bool = False) -> None:
        super().__init__()
        self._of_heads = of_heads

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        for slot, p in list(module.named_parameters(recurse=False)):
            whole = distribute_tensor(p.detach(), mesh, [Replicate()], src_data_rank=None)
            module.register_parameter(slot, nn.Parameter(whole, requires_grad=p.requires_grad))

        def come(value: Any) -> Any:
            if not isinstance(value, Tensor) or isinstance(value, DTensor):
                return value
            placement = Shard(value.ndim - 2) if self._of_heads else Replicate()
            return DTensor.from_local(value, mesh, [placement], run_check=False)

        def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
            return tree_map(come, args), tree_map(come, kwargs)

        def after(_: nn.Module, args: Any, output: Any) -> Any:
            return tree_map(lambda value: value.to_local() if isinstance(value, DTensor) else value, output)

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)
        return module


# Names in the plans of transformers -> how torch does it.
_STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise": RowwiseParallel,
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    "replicated_with_grad_allreduce": lambda: _Whole(of_heads=True),
    "replicate": _Whole,
}


def split_layers(model: nn.Module, mesh: DeviceMesh) -> None:
    """Splits a model in place, before `fully_shard`. Every rank must have the same values, or weights on the meta device.

    Args:
        model: contains at least one model of transformers with a plan.
        mesh: the ranks that compute together, one dimension.

    Raises:
        EngineError: no part of the model has a plan, the plan has an unknown style, or layers cannot be split evenly.
    """
    ranks, styles, tied = mesh.size(), _styles_of(model, mesh.size()), _tied(model)
    if unknown := sorted({style for style in styles.values() if style not in _STYLES}):
        raise EngineError(f"{_KEY}: the plan of the model has styles that are not known: {listing(unknown)}")
    beside_split = {name.rpartition(".")[0] for name, style in styles.items() if style == "colwise"}
    for name, module in list(model.named_modules()):
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        if name not in styles and next(module.children(), None) is not None:
            place = f"{name}.{next(iter(own))}" if name else next(iter(own))
            raise EngineError(
                f"{_KEY}: {place} belongs to a module with submodules, and the plan of the model leaves it out"
            )
        parent = name.rpartition(".")[0]
        if name not in styles and parent in beside_split:
            text = f"{name} has weights beside layers that are split, and the plan of the model leaves it out"
            raise EngineError(f"{_KEY}: {text}, so its gradient would be wrong")
        style = styles.get(name, "replicate")
        _require_even(name, module, style, ranks)
        parallelize_module(module, mesh, _STYLES[style](), src_data_rank=None)
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(_arrived)
        for slot, before in own.items():  # torch's RowwiseParallel makes every weight trainable
            getattr(module, slot).requires_grad_(before.requires_grad)
    # What a layer returns is a view of its DTensor; nothing in a model changes it in place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    for (owner, slot), *others in tied:
        first = getattr(owner, slot)
        for other, name in others:
            if getattr(other, name).placements != first.placements:
                raise EngineError(f"{_KEY}: the plan of the model splits a tied weight ({slot}) in two ways")
            setattr(other, name, first)


def _arrived(_: nn.Module, args: Any, output: Any) -> Any:
    """A compiled block loses the gradient of an input that is still on its way."""
    return output.clone() if isinstance(output, AsyncCollectiveTensor) else output


def _styles_of(model: nn.Module, ranks: int) -> dict[str, str]:
    """Name of each module in a plan -> its style. Plans are those of the outermost models that have one."""
    found: dict[str, str] = {}
    inside: set[nn.Module] = set()
    for prefix, part in model.named_modules():
        plan = getattr(part, "tp_plan", None)
        if not isinstance(plan, dict) or not plan or part in inside:
            continue
        inside.update(part.modules())
        for key in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(getattr(part, "config", None), key, None)
            if isinstance(heads, int) and heads % ranks:
                raise EngineError(f"{_KEY} = {ranks} does not divide the {heads} heads of the model ({key})")
        for name, _ in part.named_modules():
            style = plan.get(name) or plan.get(re.sub(r"(?<![^.])\d+(?![^.])", "*", name))
            if style is not None:
                found[f"{prefix}.{name}" if prefix else name] = style
    if not found:
        raise EngineError(f"{_KEY}: {type(model).__name__} has no plan (tp_plan), as decoders of transformers have: use 1")
    return found


def _require_even(name: str, module: nn.Module, style: str, ranks: int) -> None:
    weight = getattr(module, "weight", None)
    dim = {"colwise": 0, "embedding": 0, "rowwise": 1}.get(style.split("_")[0])
    if dim is not None and isinstance(weight, Tensor) and weight.shape[dim] % ranks:
        raise EngineError(f"{_KEY} = {ranks} does not divide {weight.shape[dim]}, a dimension of {name}.weight")


def _tied(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Places of each weight that has several."""
    places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for slot, p in module.named_parameters(recurse=False, remove_duplicate=False):
            places[id(p)].append((module, slot))
    return [found for found in places.values() if len(found) > 1]
