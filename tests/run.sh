#!/usr/bin/env bash
# Everything that must pass: style, types, tests. Sets itself up (.venv, .venv-vision).
#   tests/run.sh                     all
#   tests/run.sh --quick             the fast ones; prints what they cover
#   tests/run.sh --faults            the full product of faults and a hundred thousand random inputs; about an hour
#   tests/run.sh -k clip tests/method    style, types, and pytest with these arguments
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

if [ "${1:-}" = --quick ]; then
    echo "quick: rooms and words, configuration, scores, selection, penalty and its checks, controls, files of weights,"
    echo "       data, losses, batch scripts; parity with one process under FSDP2 and ZeRO-2"
    echo "not:   parity elsewhere, counts of calls, whole runs and interruptions, studies, plans, the pages' programs, Slurm, timm and open_clip"
    exec "$PYTHON" -m pytest -n 2 --dist worksteal --ignore tests/method/test_counts.py \
        tests/test_architecture.py tests/test_former_names.py tests/test_prose.py \
        tests/config tests/method tests/controls tests/weights/test_loading.py \
        tests/data/test_{readers,images,volumes}.py tests/objectives tests/distributed \
        tests/engines/test_{new_engine,silent_failures}.py tests/cluster/test_render.py \
        "tests/test_parity.py::test_equals_one_process[fsdp2]" "tests/test_parity.py::test_equals_one_process[zero2]"
fi
if [ "${1:-}" = --faults ]; then exec env DCFT_FAULTS=all "$PYTHON" -m pytest -n 2 --dist worksteal -rP tests/faults; fi
if [ $# -gt 0 ]; then exec "$PYTHON" -m pytest "$@"; fi

"$PYTHON" -m pytest -n 2 --dist worksteal --ignore tests/cluster/test_slurm.py

# timm and open_clip need torchvision, which does not go with the CPU build of torch 2.13. The tests on a real Slurm wait
# half of the time, so this environment is made, and its tests run, beside them.
log=$(mktemp)
(make_environment test-vision && exec "$PYTHON" -m pytest tests/models/test_vision.py) >"$log" 2>&1 &
"$PYTHON" -m pytest tests/cluster/test_slurm.py
wait $! || { cat "$log" >&2; exit 1; }
tail -n 1 "$log"
