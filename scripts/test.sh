#!/usr/bin/env bash
# Checks style and types, then runs all tests: units, real mounts, real TensorFlow.
#
#     scripts/test.sh                          everything; as root also units and mounts in Debian 13 (debian13.sh)
#     scripts/test.sh tests/unit -k archive    what pytest is to run and how; style and types all the same

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$checkout"

# Some tests use these programs, and are skipped where nobody can install them.
programs=()
command -v bsdtar >/dev/null || programs+=(libarchive-tools)
command -v rsync >/dev/null || programs+=(rsync)
if [ ${#programs[@]} -gt 0 ] && [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    apt_install "for tests" "${programs[@]}"
fi

failed=()

check() {
    local name=$1
    shift
    step "$name: $*"
    "$@" || failed+=("$name")
}

check style ruff check .
check format ruff format --check .
check types mypy
# With the slowest ones, so that a test that grows is seen.
check tests python -m pytest --durations=10 --durations-min=5 "$@"

# Debian 13 has another libfuse, with which files are read in another way, and another Python.
if [ $# -eq 0 ]; then
    step "Debian 13: scripts/debian13.sh"
    code=0
    scripts/debian13.sh hubfs --version || code=$?
    if [ "$code" -eq 77 ]; then
        step "Debian 13: left out"
    else
        check "Debian 13" scripts/debian13.sh python -m pytest --durations=10 --durations-min=5 tests/unit tests/mount
    fi
fi

if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[*]}" >&2
    exit 1
fi
