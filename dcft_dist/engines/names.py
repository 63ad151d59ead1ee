"""Parameter names: canonical names, aliases of tied weights, and patterns that match names.

The canonical name of a weight is the first name it has in the unwrapped model's `named_parameters()`. All other names
of the same weight are aliases.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from fnmatch import fnmatchcase

from torch import nn

from ..compat.pytorch import clean
from ..errors import PatternError, did_you_mean, listing

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


Patterns = str | Iterable[str]


class ParameterNames:
    """Canonical names and aliases of a model's weights.

    Attributes:
        parameters: canonical name -> the parameter that contains the weight. Under FSDP1, many names may share one flat
            parameter.
        aliases: every name, canonical names included -> canonical name.
    """

    def __init__(self, named: Iterable[tuple[str, Hashable, nn.Parameter]]) -> None:
        """
        Args:
            named: (name, identity, parameter) of each weight, in the order of `named_parameters(remove_duplicate=False)`.
                Names with equal identities belong to the same weight.
        """
        self.parameters: dict[str, nn.Parameter] = {}
        self.aliases: dict[str, str] = {}
        first: dict[Hashable, str] = {}
        for raw, identity, parameter in named:
            name = clean(raw)
            canonical = first.setdefault(identity, name)
            self.aliases[name] = canonical
            self.parameters.setdefault(canonical, parameter)

    @classmethod
    def of(cls, module: nn.Module) -> ParameterNames:
        """The names of the weights of a module."""
        return cls((name, id(p), p) for name, p in module.named_parameters(remove_duplicate=False))

    @property
    def trainable(self) -> list[str]:
        """Canonical names of the weights that require a gradient, in model order."""
        return [name for name, p in self.parameters.items() if p.requires_grad]

    def match(self, patterns: Patterns, *, what: str) -> list[str]:
        """Canonical names that match at least one pattern, in model order.

        Args:
            patterns: one pattern or several. A pattern is the name of a module or parameter (`"head"` matches
                `head.weight` and `head.bias`), or a shell-style glob over the whole name.
            what: name of the option that the patterns come from, for error messages.

        Raises:
            PatternError: a pattern matches no parameter, or `patterns` has the wrong type.
        """
        requested = as_patterns(patterns, what=what)
        matched: set[str] = set()
        for pattern in requested:
            hits = {c for n, c in self.aliases.items() if fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*")}
            if not hits:
                known = {part for name in self.aliases for part in _ancestors(name)}
                raise PatternError(
                    f"{what} pattern {pattern!r} matches no parameter{did_you_mean(pattern, known)}; "
                    f"the model has {listing(self.parameters)}"
                )
            matched |= hits
        return [name for name in self.parameters if name in matched]


def as_patterns(patterns: Patterns, *, what: str) -> tuple[str, ...]:
    """Turns one pattern, or a list, tuple or set of patterns, into a tuple.

    Args:
        patterns: the patterns.
        what: name of the option that they come from, for error messages.

    Raises:
        PatternError: `patterns` has another type.
    """
    several = (patterns,) if isinstance(patterns, str) else patterns
    if not isinstance(several, list | tuple | set | frozenset) or not all(isinstance(p, str) for p in several):
        raise PatternError(
            f"{what} must be a name or pattern such as 'classifier', a list of them, or () for none, "
            f"not {type(patterns).__name__}"
        )
    return tuple(several)


def _ancestors(name: str) -> Iterable[str]:
    """`a`, `a.b` and `a.b.c` for `a.b.c`."""
    parts = name.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


def matrix_names(module: nn.Module, names: ParameterNames) -> list[str]:
    """Canonical names of the weights of linear and convolution layers, biases left out, in model order.

    Linear layers are `nn.Linear`, the input projections of `nn.MultiheadAttention` (its output projection is an
    `nn.Linear`), and the transposed linear layer that transformers calls `Conv1D`. The experts of a mixture, which
    transformers keeps in tensors [experts, rows, columns] of a module `...Experts`, are linear layers too. Adapters of peft
    (`lora_A`, `lora_B`) are left out.

    Args:
        module: the unwrapped model.
        names: its canonical names.
    """

    def slots(sub: nn.Module) -> tuple[str, ...]:
        if isinstance(sub, (nn.Linear, *_CONVOLUTIONS)) or type(sub).__name__ == "Conv1D":
            return ("weight",)
        several = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return several if isinstance(sub, nn.MultiheadAttention) else ()

    found = {*_in_slots(module, names, slots), *_expert_names(module, names)}
    return [name for name in names.parameters if name in found and not is_adapter(name)]


def is_adapter(name: str) -> bool:
    """Whether a weight belongs to an adapter of peft. Its product is zero at first, so no gradient shows its importance."""
    return ".lora_" in name


def _expert_names(module: nn.Module, names: ParameterNames) -> list[str]:
    """Weights directly in a module of a class `...Experts`, without biases. Wrapped modules show them by name only."""
    modules = {clean(prefix) for prefix, sub in module.named_modules() if type(sub).__name__.endswith("Experts")}
    split = ((*path.rpartition("."), name) for path, name in names.aliases.items())
    return [name for parent, _, slot, name in split if parent in modules and not slot.endswith("bias")]


def table_names(module: nn.Module, names: ParameterNames) -> list[str]:
    """Canonical names of the weights of `nn.Embedding`, in model order; arguments as for `matrix_names`."""
    return _in_slots(module, names, lambda sub: ("weight",) if isinstance(sub, nn.Embedding) else ())


def _in_slots(module: nn.Module, names: ParameterNames, slots: Callable[[nn.Module], tuple[str, ...]]) -> list[str]:
    paths = (
        clean(f"{prefix}.{slot}" if prefix else slot)
        for prefix, sub in module.named_modules(remove_duplicate=False)
        for slot in slots(sub)
    )
    found = {names.aliases[path] for path in paths if path in names.aliases}
    return [name for name in names.parameters if name in found]
