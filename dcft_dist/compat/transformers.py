"""Private parts of transformers: initialisation, inputs and folder of the Trainer, and the weight names in its files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any


@contextmanager
def without_initialising() -> Iterator[None]:
    """Skips the initialisation of transformers models that are built in the block.

    Some models would draw random values again and again until the values fit. Does nothing if transformers is not installed.
    """
    if find_spec("transformers") is None:
        yield
        return
    from transformers.initialization import no_init_weights

    with no_init_weights():
        yield


def trainer_inputs(trainer: Any, batch: Any) -> Any:
    """The batch as the Trainer's own training step receives it: on the device, and under DeepSpeed in its data type."""
    return trainer._prepare_inputs(batch)


def trainer_folder(trainer: Any) -> str:
    """The folder in which the Trainer puts its checkpoints; in a hyperparameter search that of the trial."""
    return str(trainer._get_output_dir(getattr(trainer, "_trial", None)) or ".")


def names_in_transformers(model: Any, stored: Iterable[str]) -> dict[str, list[str]]:
    """Maps the weight names in a transformers file to the names in the model.

    Files keep the names that a model had when it was published. Today its modules may have other names.

    Args:
        model: a transformers model.
        stored: weight names in the file.

    Returns:
        Name in the file -> names in the model. One name: the tensor is used as it is. Several names: the tensor is cut
        along its rows into as many equal parts. No name: several tensors are merged, or one is cut in another way.
    """
    from transformers import conversion_mapping, core_model_loading

    changes = conversion_mapping.get_model_conversion_mapping(model)
    converters = [change for change in changes if isinstance(change, core_model_loading.WeightConverter)]
    renamings = [change for change in changes if isinstance(change, core_model_loading.WeightRenaming)]
    cuts = {c.source_patterns[0]: c.target_patterns for c in converters if _cuts_rows(c)}
    state, names = model.state_dict(), {}
    for name in stored:
        new_name, pattern = core_model_loading.rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        parts = cuts.get(pattern, []) if pattern else [""]
        names[name] = [new_name.replace(parts[0], part) if part else new_name for part in parts]
    return names


def _cuts_rows(change: Any) -> bool:
    """Whether a converter of transformers cuts one tensor along its rows into equal parts, and does nothing else."""
    from transformers.core_model_loading import Chunk

    steps, parts = change.operations, len(change.target_patterns)
    return len(steps) == 1 == len(change.source_patterns) and isinstance(steps[0], Chunk) and steps[0].dim == 0 and parts > 1
