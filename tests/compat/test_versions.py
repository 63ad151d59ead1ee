"""Private parts of other libraries are still there, and untested versions are warned of."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dcft_dist.compat.pytorch import fsdp2_groups
from dcft_dist.compat.versions import TESTED, USES, check_version

from ..engines.cases import SIZE, get, one_step
from ..nets import loss_fn, make_batches, make_net, make_optimizer, my_part
from ..prepared import prepare
from ..ranks import run_ranks

# -- private attributes -------------------------------------------------------------------------------------------------


def private_objects() -> dict[str, list[str]]:
    """Attributes of `versions.USES` that are missing, on live objects."""
    import importlib

    fsdp2, fsdp1 = get("fsdp2").model, get("fsdp1-hybrid-flat").model
    zero2, zero3 = get("zero2"), get("zero3")
    loss_fn(fsdp2, my_part(make_batches(1, SIZE, torch.float32)[0])).backward()
    one_step(zero3, my_part(make_batches(1, SIZE, torch.float32)[0]))
    loss_fn(fsdp1, my_part(make_batches(1, SIZE, torch.float32)[0]))
    state = fsdp2._get_fsdp_state()
    parameters = [dict(z.model.module.named_parameters())["conv.weight"] for z in (zero2, zero3)]
    checkpointed = get("fsdp2-checkpoint").model.blocks[0]
    half = prepare(make_net, "zero0", lambda p: make_optimizer("sgd", p), bf16=True, micro_batch=SIZE // 2)
    bf16 = prepare(make_net, "zero1-sum32", lambda p: make_optimizer("sgd", p), bf16=True, micro_batch=SIZE // 2)
    objects = {
        "torch": torch,
        "Module": make_net(),
        "DTensor": next(fsdp2.parameters()),
        "FSDPParamGroup.mesh_info": fsdp2_groups(fsdp2)[0].mesh_info,
        "FSDPModule": fsdp2,
        "FSDPState": state,
        "FSDPParamGroup": fsdp2_groups(fsdp2)[0],
        "FSDPParam": fsdp2_groups(fsdp2)[0].fsdp_params[0],
        "FullyShardedDataParallel": fsdp1,
        "FlatParamHandle": fsdp1._handle,
        "FlatParameter": fsdp1._handle.flat_param,
        "DeepSpeedEngine": zero2.model,
        "DeepSpeedZeroOptimizer": zero2.model.optimizer,
        "DeepSpeedZeroOptimizer.parameter": parameters[0],
        "DeepSpeedZeroOptimizer.parameter._hp_mapping": next(
            p._hp_mapping for p in zero2.model.module.parameters() if getattr(p, "_hp_mapping", None)
        ),
        "CheckpointWrapper": checkpointed,
        "OptimizedModule": torch.compile(nn.Linear(1, 1)),
        "DeepSpeedZeroOptimizer_Stage3": zero3.model.optimizer,
        "DeepSpeedZeroOptimizer_Stage3.parameter": parameters[1],
        "FP16_UnfusedOptimizer": half.model.optimizer,
        "BF16_Optimizer": bf16.model.optimizer,
    }
    for where in USES:
        if where == "transformers.Trainer":
            objects[where] = importlib.import_module("transformers").Trainer
        elif where.startswith(("torch.", "deepspeed.", "transformers.")):
            objects[where] = importlib.import_module(where)
    named = {where: type(thing).__name__ for where, thing in objects.items() if where.endswith("Optimizer")}
    assert all(where == name for where, name in named.items()), named
    return {w: [a for a in names if not hasattr(objects[w], a)] for w, names in USES.items()}


def test_no_private_attribute_is_gone() -> None:
    for missing in run_ranks(2, private_objects):
        assert {where: names for where, names in missing.items() if names} == {}


def test_an_untested_version_warns(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    check_version.cache_clear()
    check_version("torch")
    assert caplog.text == ""
    check_version.cache_clear()
    monkeypatch.setitem(TESTED, "torch", ("2.9", "2.10"))
    check_version("torch")
    assert "is not one of the tested versions" in caplog.text and "(2.9, 2.10)" in caplog.text
    check_version.cache_clear()


# -- DeepSpeed on a machine without GPU -----------------------------------------------------------------------------------

ONE_RANK = """
import os, torch
from dcft_dist.compat.deepspeed import import_deepspeed
deepspeed = import_deepspeed()
deepspeed.init_distributed("gloo")
net = torch.nn.Linear(4, 2)
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
model, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.SGD(net.parameters(), 0.1), config=config)
model.backward(model(torch.ones(1, 4)).sum())
model.step()
print("stepped", os.listdir(os.environ["TORCH_EXTENSIONS_DIR"]), flush=True)
os._exit(0)
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_deepspeed_neither_compiles_nor_waits_for_a_stale_build_lock(tmp_path: Path) -> None:
    """A compilation that was killed leaves a lock that later ones wait for without end: nothing may ask for it."""
    stale = tmp_path / "extensions/deepspeed_shm_comm"
    stale.mkdir(parents=True)
    (stale / "lock").touch()
    done = subprocess.run(
        [sys.executable, "-c", ONE_RANK], capture_output=True, text=True, timeout=60,
        env={k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
        | {"TORCH_EXTENSIONS_DIR": str(stale.parent), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
    )  # fmt: skip
    assert "stepped ['deepspeed_shm_comm']" in done.stdout, done.stderr
    assert [f.name for f in stale.iterdir()] == ["lock"]
