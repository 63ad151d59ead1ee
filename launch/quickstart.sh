#!/usr/bin/env bash
# The main job: fine-tunes MiniLM on ICD-10-CM chapters with DCFT, and compares it with a linear probe.
#   --compare    also run full fine-tuning, a random set, and SGD with the gradient hook (takes about three times as long)
#   --use-env    use the active environment and its torch instead of installing .venv (as on a cluster)
#   --runs DIR   directory for the runs (default: runs)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
compare='' use_env='' runs=$root/runs
while [ $# -gt 0 ]; do
    case $1 in
        --compare) compare=1 ;;
        --use-env) use_env=1 ;;
        --runs) runs=${2:?--runs needs a directory}; shift ;;
        *) sed -n '2,5p' "$0" | cut -c3-; [ "$1" = --help ] && exit 0; exit 2 ;;
    esac
    shift
done
if [ -n "$use_env" ]; then PYTHON=python; else . "$root/launch/environment.sh"; make_environment demo; fi

gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
ranks=$((gpus > 0 ? gpus : 2))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
done_runs=()

adapt() { # CONFIG NAME [overrides]
    local config=$root/configs/$1 name=$2; shift 2
    "$PYTHON" -m dcft_dist.cli check "$config" --ranks "$ranks" --name "$name" --runs_dir "$runs" "$@"
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$ranks" -m dcft_dist.cli \
        train "$config" --name "$name" --runs_dir "$runs" "$@"
    done_runs+=("$runs/$name")
}

adapt icd.toml icd_linear_probe --method linear_probe
adapt icd.toml icd_dcft
if [ -n "$compare" ]; then
    adapt icd.toml icd_full --method full
    adapt icd.toml icd_random_set --selection.kind random --removal.fractions "[]"
    adapt icd_sgd.toml icd_sgd_dcft
fi
echo
"$PYTHON" -m dcft_dist.cli table "${done_runs[@]}"
echo
echo "report: $runs/icd_dcft/report.html"
