#!/usr/bin/env bash
# What every rendered sbatch file ends with: `dcft_dist.cluster.render` puts "$@", run, one, each and ranks before it.
# shellcheck shell=bash disable=SC2154 # those are set by the lines before
# -- cut here --
# -- a warning from Slurm becomes a file that the ranks look for at each step: a signal would end torchrun --
export DCFT_STOP_FILE=$PWD/.dcft-stop-$SLURM_JOB_ID
rm -f "$DCFT_STOP_FILE"
pid=
trap 'touch "$DCFT_STOP_FILE"; ( sleep "${DCFT_GRACE_S:-@GRACE@}"; [ -z "$pid" ] || kill "$pid" ) 2>/dev/null &' USR1
again() { # the bare id of an array would mean all of its tasks
    rm -f "$DCFT_STOP_FILE"
    if scontrol requeue "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"; then exit 0; fi
    exit 75
}

# -- the nodes --
nodes=${SLURM_NNODES:?start this with sbatch} restart=${SLURM_RESTART_COUNT:-0}
# After a node was lost and found again Slurm may keep an old step, and new ones wait for ever ("Requested nodes are busy").
[ "$restart" = 0 ] || srun "${each[@]}" --immediate=60 true || again
mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
if [ -n "${DCFT_HEAD_ADDRESS:-}" ]; then
    address=$DCFT_HEAD_ADDRESS
else
    address=$(srun --nodes=1 --ntasks=1 -w "${names[0]}" hostname --ip-address | awk '{print $1}')
    case $address in 127.*) address=${names[0]} ;; esac   # a host that resolves its own name to loopback
fi
port=${DCFT_PORT:-$((20000 + (SLURM_JOB_ID + 97 * restart) % 20000))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false

# -- bad input, and nodes that cannot reach each other: found before any rank starts, and not tried again --
"${one[@]}" -m dcft_dist.cli check "$@" --ranks $((nodes * ranks))
export DCFT_SECRET=${DCFT_SECRET:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}   # by which the nodes of this job know each other
[ "$nodes" = 1 ] || srun "${each[@]}" --kill-on-bad-exit=0 \
    "${run[@]}" -m dcft_dist.cluster.node_check "$address" "$port" "${DCFT_MEET_S:-60}" "${names[@]}"
[ ! -e "$DCFT_STOP_FILE" ] || again

# -- the ranks: torchrun on each node --
export PET_TEE=3 DCFT_LOGS=${DCFT_LOGS:-logs}/$SLURM_JOB_ID.$restart   # PET_*: torchrun's options
# shellcheck disable=SC2016 # expanded on each node
node='export PET_LOG_DIR=$DCFT_LOGS/$SLURMD_NODENAME PET_RDZV_CONF=is_host=$((SLURM_NODEID == 0)); exec "$@"'
srun "${each[@]}" --kill-on-bad-exit=1 --label bash -c "$node" _ \
    "${run[@]}" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$ranks" --max-restarts $((nodes == 1 ? 2 : 0)) \
    --rdzv-id "$SLURM_JOB_ID.$restart" --rdzv-backend c10d --rdzv-endpoint "$address:$port" \
    -m dcft_dist.cli train "$@" &
pid=$!
while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done   # a trapped signal ends `wait`, not srun

# -- finished, to be started again, or failed for good? --
code=0
"${one[@]}" -m dcft_dist.cli status "$@" --verdict || code=$?
[ "$code" != 75 ] || again
rm -f "$DCFT_STOP_FILE"
exit "$code"
