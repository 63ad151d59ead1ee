"""Private parts of transformers: initialisation, the Trainer's inputs, and the names in its files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

# -- transformers ---------------------------------------------------------------------------------------------------------


@contextmanager
def without_initialising() -> Iterator[None]:
    """A block in which transformers' models keep what memory they get: some draw until the values suit."""
    if find_spec("transformers") is None:
        yield
        return
    from transformers.initialization import no_init_weights

    with no_init_weights():
        yield


def trainer_inputs(trainer: Any, batch: Any) -> Any:
    """The batch as the Trainer's own steps see it: on the device, under DeepSpeed in its data type."""
    return trainer._prepare_inputs(batch)


def names_in_transformers(model: Any, stored: Iterable[str]) -> dict[str, list[str]]:
    """Name in a file of transformers -> name in the model; several: it is cut into so many equal parts of its rows; none:
    several tensors are merged into one, or one is cut otherwise.

    Files keep the names that a model had when it was published, whatever its modules are called today.
    """
    from transformers import conversion_mapping, core_model_loading

    found = conversion_mapping.get_model_conversion_mapping(model)
    merging = [change for change in found if isinstance(change, core_model_loading.WeightConverter)]
    renaming = [change for change in found if isinstance(change, core_model_loading.WeightRenaming)]
    cuts = {c.source_patterns[0]: c.target_patterns for c in merging if _cuts_rows(c)}
    state, names = model.state_dict(), {}
    for name in stored:
        new, by = core_model_loading.rename_source_key(name, renaming, merging, model.base_model_prefix, state)
        parts = cuts.get(by, []) if by else [""]
        names[name] = [new.replace(parts[0], part) if part else new for part in parts]
    return names


def _cuts_rows(change: Any) -> bool:
    """Whether a change of transformers cuts one tensor into equal parts of its rows."""
    from transformers.core_model_loading import Chunk

    ways, many = change.operations, len(change.target_patterns)
    return len(ways) == 1 == len(change.source_patterns) and isinstance(ways[0], Chunk) and ways[0].dim == 0 and many > 1
