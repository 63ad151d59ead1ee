"""`dcft init FILE --study RUN`: a study of a configuration, ready for `dcft compare`."""

from __future__ import annotations

import json
from pathlib import Path

from ..config.toml import load_config
from ..errors import ConfigError

_PULLS = (100.0, 300.0, 1000.0)  # `optimizer.pull_to_start`, at the configuration's learning rate


def study_of(source: Path, name: str) -> str:
    """A study that compares DCFT with full fine-tuning, L2-SP, a linear probe and a random set, as TOML.

    Each arm chooses among three values on three seeds, and is then tested on five others. Your own data are divided into
    five folds, one for each seed; a packaged task draws other training examples.

    Args:
        source: a configuration, or the folder of a run.
        name: name of the study.

    Raises:
        ConfigError: the configuration is wrong, or its task has no classes: a study compares accuracies.
    """
    base = source / "config.toml" if source.is_dir() else source
    config = load_config(base)
    if config.task.kind != "single_label":
        raise ConfigError(f"{base}: a study compares accuracies, so task.kind is 'single_label', not {config.task.kind!r}")
    rate, own = config.optimizer.lr, config.task.name == "own"
    rates = f"optimizer.lr = {[float(f'{rate * factor:.3g}') for factor in (0.4, 1.0, 2.5)]}"
    pulls = f"optimizer.pull_to_start = {[pull for pull in _PULLS if pull * rate <= 1.0]}"
    arms = {
        "probe": ['method = "linear_probe"'],
        "full": ['method = "full"', rates],
        "l2_sp": ['method = "full"', pulls],
        "dcft": ['method = "dcft"', rates],
        "random_matched": ['method = "dcft"', 'selection.kind = "random_magnitude"', rates],
    }
    lines = [
        "# Does DCFT help here, and is it the selected weights? Lists are tuned on validation data of `tune_seeds`.",
        f"# Then each arm is tested on `seeds`. How much it is: dcft compare {name}.toml --count. All keys: docs/studies.md",
        f"name = {json.dumps(name)}",
        f"base = {json.dumps(str(base))}",
        "tune_seeds = [1000, 1001, 1002]",
        "seeds = [0, 1, 2, 3, 4]",
        "folds = 5                       # seed s validates with fold s; the test data stay"
        if own
        else "resample = true                 # each seed draws its own training examples",
        "",
        f"[settings.{config.name.replace('.', '_')}]",
    ]
    for arm, keys in arms.items():
        lines += ["", f"[arms.{arm}]", *keys]
    for minus, deciding in (("random_matched", True), ("full", False), ("l2_sp", False)):
        lines += ["", "[[contrasts]]", 'arm = "dcft"', f'minus = "{minus}"', *(["deciding = true"] if deciding else [])]
    return "\n".join(lines) + "\n"
