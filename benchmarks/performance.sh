#!/usr/bin/env bash
# Writes docs/results/performance.md again: about half an hour on an idle machine with two cores and 16 GiB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python} page=docs/results/performance.md
export OMP_NUM_THREADS=1
{
    cat benchmarks/performance.md
    for line in \
        "selection.py --elements 100_000_000 --ranks 2" \
        "selection.py --elements 1_000_000_000 --ranks 2 --kinds normal --alone" \
        "penalty.py --samples 4" "penalty.py --samples 16" \
        "scoring.py --ranks 2" \
        "attach.py --weights 1_000_000_000 --ranks 2" \
        "input.py" \
        "loading.py --ranks 4 --layers 32" \
        "growth.py --picture docs/images/growth.png"; do
        printf '\n## \x60%s\x60\n\n' "$line"
        # shellcheck disable=SC2086 # words
        "$python" benchmarks/${line}
    done
} > "$page.new"
mv "$page.new" "$page"
