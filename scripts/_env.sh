# Sourced by the scripts beside it: makes .venv with the pinned packages and this checkout, once.
# PYTHON names the interpreter (3.11 or newer). Runs from any directory; says what it does on stderr.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "apex4: Python 3.11 or newer is needed: install it or set PYTHON" >&2
    return 1
}

pip_install() {
    "$VENV/bin/python" -m pip install --quiet --no-input --disable-pip-version-check --retries 5 \
        -c "$ROOT/constraints.txt" "$@" 1>&2
}

ensure_venv() {
    # The stamp changes with whatever decides what is installed, and with the folder (an editable install names it).
    local stamp python
    stamp="$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" <(echo "$ROOT") | cksum)"
    if [ "$(cat "$VENV/apex4-stamp" 2>/dev/null)" = "$stamp" ] && "$VENV/bin/python" -c '' 2>/dev/null; then
        return
    fi
    python="$(find_python)"
    echo "apex4: setting up $VENV (once)" >&2
    "$python" -m venv --clear "$VENV"
    # torch first and by its exact version, so that nothing else chooses another build of it.
    pip_install torch
    pip_install -e "$ROOT[test,docs]"
    echo "$stamp" >"$VENV/apex4-stamp"
}
