"""No test may leave anything behind that another one could stumble over."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

# Set by pytest, by torch when its optimizers load, by wandb, by MLflow, and when datasets, MONAI and scikit-learn are
# imported.
OF_OTHERS = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_NVML_BASED_CUDA_CHECK"}
OF_OTHERS |= {"KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "WANDB_SERVICE", "_MLFLOW_TELEMETRY_SESSION_ID"}


# Records of trust go here, not into the home of whoever runs the tests.
os.environ["XDG_STATE_HOME"] = _state = tempfile.mkdtemp(prefix="dcft-state-")
atexit.register(shutil.rmtree, _state, ignore_errors=True)


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    environment, threads, directory = dict(os.environ), torch.get_num_threads(), os.getcwd()
    yield
    assert not dist.is_initialized(), "a process group was left behind"
    changed = {k for k in {*environment, *os.environ} if environment.get(k) != os.environ.get(k)} - OF_OTHERS
    assert not changed, f"environment variables were changed: {changed}"
    assert torch.get_num_threads() == threads
    assert os.getcwd() == directory
