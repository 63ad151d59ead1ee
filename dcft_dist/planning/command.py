"""The command `dcft plan`: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_arguments(plan: argparse.ArgumentParser) -> None:
    """Adds the arguments of `dcft plan`. Those without a default follow the configuration."""
    plan.add_argument("--model", required=True, help="vit_large, vit_huge, vit_giant, decoder_1b, decoder_7b, decoder_70b, "
                      "a folder with a transformers config.json, or a configuration file (then any key)")  # fmt: skip
    plan.add_argument("--ranks", type=int, default=8)
    plan.add_argument("--gpus-per-node", type=int, default=8)
    plan.add_argument("--engine", choices=("fsdp2", "zero3"))
    plan.add_argument(
        "--replicas", type=int, help="number of groups of ranks, each with a full copy of the weights (hybrid sharding)"
    )
    plan.add_argument("--tensor-parallel", type=int, help="ranks that share the layers of a model")
    plan.add_argument("--micro-batch", type=int)
    plan.add_argument("--accumulation", type=int, help="micro-batches in a step")
    plan.add_argument("--reduce", choices=("auto", "last", "each"), help="when their gradients are reduced over the ranks")
    plan.add_argument(
        "--activation-checkpointing",
        choices=("none", "blocks", "selective"),
        help="what the backward computes again instead of keeping it",
    )
    plan.add_argument("--activations-on-host", action="store_true", default=None, help="they wait in host memory")
    plan.add_argument(
        "--offload", action="store_true", default=None, help="weights and optimizer state are in host memory (fsdp2)"
    )
    plan.add_argument("--length", type=int, help="tokens in a sample of text (default: 512)")
    plan.add_argument("--level", choices=("update", "gradient"))
    plan.add_argument("--where", choices=("before", "after"))
    plan.add_argument("--fp32", dest="bf16", action="store_false", default=None, help="compute in float32, not bfloat16")
    plan.add_argument("--memory-gib", type=float, default=80.0, help="memory of one GPU in GiB")
    plan.add_argument("--host-memory-gib", type=float, help="host memory of one node in GiB")
    plan.add_argument(
        "--fit", action="store_true", help="find the largest micro-batch that fits, with each kind of checkpointing"
    )
    plan.add_argument("--json", action="store_true")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    """Prints the forecast, or what fits.

    Args:
        options: the arguments.
        rest: words that override keys of a configuration file.

    Raises:
        DcftError: see `request_of` and `forecast`; or the configuration names code that may not run.
    """
    from ..config.needs import needed_by_model, require_packages
    from ..config.toml import load_config
    from ..config.trust import require_trust
    from .fit import fitting, fitting_table
    from .memory import forecast, table
    from .planned_models import is_configuration, request_of

    ours = ("command", "json", "trust_code", "fit")
    fields: dict[str, Any] = {key: value for key, value in vars(options).items() if key not in ours}
    request = request_of(fields.pop("model"), rest, **fields)
    if is_configuration(request.model):
        config = load_config(request.model, list(request.words))
        require_packages(config, request.model, needed_by_model)
        require_trust(config, request.model, options.trust_code, rest)
    if options.fit:
        found = fitting(request)
        print(json.dumps([f.to_json() for f in found]) if options.json else fitting_table(found))
        return
    result = forecast(request)
    print(json.dumps(result.to_json()) if options.json else table(result))
