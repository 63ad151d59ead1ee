# shellcheck shell=bash
# interruptible COMMAND...: runs torchrun so that the first Ctrl-C lets the ranks save a checkpoint; a second one ends them.
interruptible() {
    local pid code=0
    DCFT_STOP_FILE=${DCFT_STOP_FILE:-$(mktemp -u -t dcft-stop.XXXXXX)}
    export DCFT_STOP_FILE
    setsid "$@" & # a session of its own: the terminal's Ctrl-C reaches this script alone
    pid=$!
    trap 'if [ -e "$DCFT_STOP_FILE" ]; then kill "$pid"; else touch "$DCFT_STOP_FILE"; echo; echo "stopping after this step, with a checkpoint; Ctrl-C again ends it at once" >&2; fi' INT
    trap 'kill "$pid"' TERM HUP
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
    wait "$pid" || code=$?
    rm -f "$DCFT_STOP_FILE"
    return "$code"
}
