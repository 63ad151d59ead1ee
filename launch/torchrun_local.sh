#!/usr/bin/env bash
# One run on this machine: one rank per GPU, or two gloo ranks. If a rank dies, all ranks restart from the last checkpoint.
#   launch/torchrun_local.sh CONFIG [--key value ...]      RANKS=4 sets the number of ranks
set -euo pipefail
[ $# -gt 0 ] || { sed -n '2,3p' "$0" | cut -c3-; exit 2; }
. "$(dirname "${BASH_SOURCE[0]}")/interruptible.sh"
python=${DCFT_PYTHON:-python}
ranks=${RANKS:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 2)')}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
"$python" -m dcft_dist.cli check "$@" --ranks "$ranks"
interruptible "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" --max-restarts "${RESTARTS:-2}" \
    -m dcft_dist.cli train "$@"
