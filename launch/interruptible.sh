# shellcheck shell=bash
# interruptible COMMAND...: runs torchrun so that the first Ctrl-C or SIGTERM lets the ranks save a checkpoint; a second one
# ends them. Its exit code is torchrun's, and 143 where SIGTERM came and torchrun has none: the run may not be finished.
interruptible() {
    local pid="" code=0 terminated=0
    DCFT_STOP_FILE=${DCFT_STOP_FILE:-$(mktemp -u -t dcft-stop.XXXXXX)}
    export DCFT_STOP_FILE
    trap 'stop_or_end "$pid" Ctrl-C' INT
    trap 'terminated=143; stop_or_end "$pid" SIGTERM' TERM
    trap 'kill "$pid"' HUP
    setsid "$@" & # a session of its own: the terminal's Ctrl-C reaches this script alone
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
    wait "$pid" || code=$?
    rm -f "$DCFT_STOP_FILE"
    [ "$code" != 0 ] || code=$terminated
    return "$code"
}

stop_or_end() {
    if [ -e "$DCFT_STOP_FILE" ]; then kill "$1"; return; fi
    touch "$DCFT_STOP_FILE"
    echo "stopping after this step, with a checkpoint; $2 again ends it at once" >&2
}
