"""Parameter names: canonical names, tied aliases, and patterns over them.

The canonical name of a weight is its first occurrence in the unwrapped model's `named_parameters()`; every other name
of the same weight is an alias of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from fnmatch import fnmatchcase

from torch import nn

from ..compat.pytorch import clean
from ..errors import PatternError, did_you_mean, listing

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


Patterns = str | Iterable[str]


class ParameterNames:
    """Canonical names of a module's weights: `parameters` by name, `aliases` (every name -> its canonical name).

    `parameters` holds what the weight lives in; under FSDP1 that may be one flat parameter for many names.
    """

    def __init__(self, named: Iterable[tuple[str, Hashable, nn.Parameter]]) -> None:
        """`named`: (name, identity of the weight, parameter) in the order of `named_parameters(remove_duplicate=False)`."""
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
        return cls((name, id(p), p) for name, p in module.named_parameters(remove_duplicate=False))

    @property
    def trainable(self) -> list[str]:
        return [name for name, p in self.parameters.items() if p.requires_grad]

    def match(self, patterns: Patterns, *, what: str) -> list[str]:
        """Canonical names matched by any pattern, in model order.

        A pattern is a shell-style glob over the whole name, or the name of a module or parameter (`"head"` matches
        `head.weight` and `head.bias`).

        Raises:
            PatternError: a pattern matches nothing.
        """
        wanted = as_patterns(patterns, what=what)
        found: set[str] = set()
        for pattern in wanted:
            hits = {c for n, c in self.aliases.items() if fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*")}
            if not hits:
                known = {part for name in self.aliases for part in _ancestors(name)}
                raise PatternError(
                    f"{what} pattern {pattern!r} matches no parameter{did_you_mean(pattern, known)}; "
                    f"the model has {listing(self.parameters)}"
                )
            found |= hits
        return [name for name in self.parameters if name in found]


def as_patterns(patterns: Patterns, *, what: str) -> tuple[str, ...]:
    """One pattern or several, as a tuple.

    Raises:
        PatternError: something else was given.
    """
    given = (patterns,) if isinstance(patterns, str) else patterns
    if not isinstance(given, list | tuple | set | frozenset) or not all(isinstance(p, str) for p in given):
        raise PatternError(
            f"{what} must be a name or pattern such as 'classifier', a list of them, or () for none, "
            f"not {type(patterns).__name__}"
        )
    return tuple(given)


def _ancestors(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


def matrix_names(module: nn.Module, names: ParameterNames) -> list[str]:
    """Canonical names of the weights of linear and convolution layers (attention projections included).

    Counted as linear: `nn.Linear`, the projections of `nn.MultiheadAttention`, and the transposed linear layer that
    transformers calls `Conv1D`.
    """
    found: set[str] = set()
    for prefix, sub in module.named_modules(remove_duplicate=False):
        wanted: tuple[str, ...] = ()
        if isinstance(sub, (nn.Linear, *_CONVOLUTIONS)) or type(sub).__name__ == "Conv1D":
            wanted = ("weight",)
        elif isinstance(sub, nn.MultiheadAttention):
            wanted = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        for name in wanted:
            full = clean(f"{prefix}.{name}" if prefix else name)
            if full in names.aliases:
                found.add(names.aliases[full])
    return [name for name in names.parameters if name in found]
