#!/usr/bin/env bash
# Measures again and writes docs/results/performance.md: about half an hour on an idle machine with two cores and 16 GiB.
# With the argument `gpu`, it writes docs/results/gpu.md: four minutes on one GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=1 PYTHONPATH=$PWD
name=performance lines=(
    "host_cost.py"
    "selection.py --elements 100_000_000 --ranks 2"
    "selection.py --elements 1_000_000_000 --ranks 2 --kinds normal --alone"
    "penalty.py --samples 4" "penalty.py --samples 16"
    "scoring.py --ranks 2"
    "attach.py --weights 1_000_000_000 --ranks 2"
    "input.py"
    "loading.py --folder /tmp/decoder_7b --ranks 4 --layers 32 --dtype bfloat16"
    "loading.py --folder /tmp/decoder_3b --ranks 4 --layers 16"
    "checkpoint_plan.py"
    "growth.py --picture docs/images/growth.png"
    "throughput.py icd.toml --ranks 1 --rounds 7 --steps 4" "throughput.py icd.toml --ranks 2 --rounds 7 --steps 8"
    "throughput.py mri.toml --ranks 1 --rounds 5 --steps 2" "throughput.py mri.toml --ranks 2 --rounds 5 --steps 2")
if [[ ${1:-} == gpu ]]; then
    name=gpu lines=(
        "kernels.py --weights 500_000_000"
        "selection.py --elements 100_000_000 --gpu"
        "selection.py --elements 1_000_000_000 --gpu --kinds normal tied"
        "penalty.py --layers 24 --width 1024 --samples 64 --length 196"
        "timeline.py --layers 24 --width 1024 --samples 64 --length 196 --picture docs/images/timeline.png"
        "steps.py vit_large --micro-batch 64"
        "steps.py vit_giant --micro-batch 32"
        "steps.py decoder_1b --micro-batch 4 --length 1024")
fi
page=docs/results/$name.md
{
    cat "benchmarks/$name.md"
    for line in "${lines[@]}"; do
        printf '\n## \x60%s\x60\n\n' "$line"
        # shellcheck disable=SC2086 # a line is several words
        "$python" benchmarks/${line}
    done
} > "$page.new"
mv "$page.new" "$page"
