#!/usr/bin/env bash
# Measures hubfs on this machine and writes docs/benchmarks.md with its plots.
#
#     scripts/bench/run.sh                 quick: small models, 3 runs of each figure; some minutes
#     scripts/bench/run.sh full            the sizes of the docs, 5 runs; about an hour, 12 GB of disk
#
#     HUBFS_BENCH_DIR=DIR                  where models, programs and figures are kept (default: .bench in the
#                                          checkout); not below /etc, /usr or /var, which Debian 13 has of its own
#
# Installs what it needs (see scripts/setup.sh). rclone and ratarmount are installed to compare with where that
# is possible, and left out otherwise. Kernel passthrough needs a newer libfuse than Debian 12 has: there, and as
# root, it is measured in a Debian 13 (scripts/debian13.sh).
#
# Exit codes: 0 done, 1 something failed, 2 wrong use. A missed target is no failure.

mode=${1:-quick}
case $#:$mode in
    [01]:quick | [01]:full | *:measure) ;;
    *) printf 'usage: %s [quick|full]\n' "$0" >&2 && exit 2 ;;
esac

source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
cd "$checkout"
HUBFS_BENCH_DIR=$(realpath -m "${HUBFS_BENCH_DIR:-$checkout/.bench}")
export HUBFS_BENCH_DIR

# have_program NAME: tries to install a program that is measured beside hubfs.
have_program() {
    command -v "$1" >/dev/null || { [ "$(id -u)" -eq 0 ] && (apt_install "to compare with" "$1") >&2; } ||
        step "$1: not there, so left out"
}

have_ratarmount() {
    local programs
    programs=$HUBFS_BENCH_DIR/ratarmount-$(python -c 'import platform; print(platform.python_version())')
    export HUBFS_BENCH_PROGRAMS=$programs/bin
    command -v ratarmount >/dev/null || [ -e "$programs/complete" ] || {
        step "ratarmount: installing it in $programs"
        # aiohttp is what it reads URLs with.
        quietly python -m venv --clear "$programs" &&
            quietly "$programs/bin/python" -m pip install --disable-pip-version-check --no-input \
                ratarmount fsspec aiohttp && touch "$programs/complete"
    } || step "ratarmount: could not be installed, so left out"
}

# measure MODE FILE [PART...]: on this very system
measure() {
    local sizes=$1 file=$2
    shift 2
    have_program curl
    have_program rclone
    have_ratarmount
    python scripts/bench/run.py "$sizes" --json "$file" ${1:+--only "$@"}
}

# With TensorFlow, which scripts/debian13.sh does without.
measure_in_debian13() {
    local code=0
    step "Debian 13: measuring kernel passthrough"
    scripts/debian13.sh env HUBFS_VENV="$HUBFS_BENCH_DIR/venv-debian13" HUBFS_EXTRAS=tensorflow \
        HUBFS_BENCH_DIR="$HUBFS_BENCH_DIR" bash scripts/bench/run.sh measure "$mode" "$1" \
        startup read open load-warm transfer || code=$?
    [ "$code" -ne 77 ] || step "Debian 13: cannot be had here, so kernel passthrough is left out"
    return "$code"
}

if [ "$mode" = measure ]; then
    shift
    measure "$@"
    exit
fi

results=$HUBFS_BENCH_DIR/results
mkdir -p "$results"
rm -f "$results"/*.json
failed=0
measure "$mode" "$results/1.json" || failed=1
if grep -q '"passthrough": ' "$results/1.json" && [ "$(id -u)" -eq 0 ]; then
    measure_in_debian13 "$results/2.json" || [ $? -eq 77 ] || failed=1
fi
python -m scripts.bench.page "$results"/*.json
exit "$failed"
