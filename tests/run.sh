#!/usr/bin/env bash
# Everything that must pass: style, types, tests. Sets itself up (.venv). Arguments go to pytest.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
. launch/environment.sh
make_environment test
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false CUDA_VISIBLE_DEVICES=
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"${PYTHON%/*}/shellcheck" -e SC1091 launch/*.sh dcft_dist/cluster/*.sh slurm/*.sbatch tests/golden/*.sbatch tests/run.sh benchmarks/*.sh
if [ $# -gt 0 ]; then exec "$PYTHON" -m pytest "$@"; fi
# Many tests wait more than they compute. Those on a real Slurm watch the clock: they have the machine to themselves.
"$PYTHON" -m pytest -n 2 --dist loadfile --ignore tests/cluster/test_slurm.py
"$PYTHON" -m pytest tests/cluster/test_slurm.py
make_environment test-vision # timm and open_clip need torchvision, which does not go with the CPU build of torch 2.13
"$PYTHON" -m pytest tests/models/test_vision.py
