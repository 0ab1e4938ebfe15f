# Sourced by scripts/demo and scripts/test: makes .venv with the pinned packages and this checkout, once.
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
    "$VENV/bin/python" -m pip install -q -c "$ROOT/constraints.txt" torch 1>&2
    "$VENV/bin/python" -m pip install -q -c "$ROOT/constraints.txt" -e "$ROOT[test]" 1>&2
    echo "$stamp" >"$VENV/apex4-stamp"
}
