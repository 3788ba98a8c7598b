#!/bin/sh
# The tests on every supported Python that is here (pyenv's, or on PATH), with the newest and with the lowest supported versions
# of what they drive, each in an environment of its own. Usage: test-matrix.sh [ENTRY...]; an entry is 3.11-lowest, all without one.
set -u
cd "$(dirname "$0")/.." || exit 1
[ $# -gt 0 ] || set -- 3.10-lowest 3.11-lowest 3.12-lowest 3.13-lowest 3.10-newest 3.11-newest 3.12-newest 3.13-newest
unset PYTHONDONTWRITEBYTECODE # see the Makefile
jobs=${JOBS:-$(($(nproc) * 2))}

python_of() { # 3.11 -> its interpreter; nothing where there is none
    for python in "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python "$(command -v "python$1")"; do
        [ -x "$python" ] && "$python" -c 'import ensurepip, venv' 2>/dev/null && { echo "$python"; return; }
    done
}

set_up() { # PYTHON VENV lowest|newest
    ready="$2/.ready-$(cat pyproject.toml tools/lowest.txt | cksum | cut -d' ' -f1)"
    [ ! -e "$ready" ] || return 0
    constraint=""
    [ "$3" = newest ] || constraint="--constraint tools/lowest.txt"
    # shellcheck disable=SC2086
    "$1" -m venv --clear "$2" &&
        "$2/bin/python" -m pip install --quiet --upgrade 'pip>=25.1' &&
        "$2/bin/python" -m pip install --quiet $constraint --editable '.[gunicorn,uvicorn,starlette,celery,django,prometheus,cli]' --group dev &&
        touch "$ready"
}

run() { # VENV: first what is fast
    "$1/bin/python" -m pytest -q -p no:cacheprovider -n "$jobs" tests/kernel tests/unit ${ARGS:-} &&
        "$1/bin/python" -m pytest -q -p no:cacheprovider -n "$jobs" --dist loadgroup tests/servers ${ARGS:-}
}

results="" failed=0
for entry; do
    python=$(python_of "${entry%-*}")
    if [ -z "$python" ]; then
        result="not run: there is no Python ${entry%-*} here"
    else
        echo "== $entry: $("$python" --version)"
        if ! set_up "$python" ".venv-matrix/$entry" "${entry#*-}"; then
            result="could not be set up" failed=1
        elif run ".venv-matrix/$entry"; then
            result="passed"
        else
            result="FAILED" failed=1
        fi
    fi
    results="$results$entry: $result
"
done
printf '\n%s' "$results"
exit $failed
