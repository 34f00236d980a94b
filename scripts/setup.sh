#!/usr/bin/env bash
# Makes this checkout ready to run: Debian packages, /dev/fuse, a virtual environment with hubfs in it.
#
#     scripts/setup.sh                     run it; doing so again costs nothing
#     source scripts/setup.sh              run it, and have `hubfs` and `python` on PATH afterwards
#
#     HUBFS_VENV=DIR                       where the virtual environment is (default: .venv in the checkout)
#     HUBFS_PYTHON=PYTHON                  what to make it with (default: the first python3 >= 3.10 found)
#     HUBFS_EXTRAS=EXTRA,...               what to install with hubfs (default: tensorflow,dev)

set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$(realpath -m "${HUBFS_VENV:-$checkout/.venv}")
extras=${HUBFS_EXTRAS:-tensorflow,dev}

step() { printf '==> %s\n' "$*"; }

fail() {
    printf 'setup: %s\n' "$1" >&2
    shift
    [ $# -eq 0 ] || printf '       %s\n' "$@" >&2
    exit 1
}

# Runs a command whose output matters only if it fails.
quietly() {
    local output
    output=$(mktemp)
    if ! "$@" >"$output" 2>&1 </dev/null; then
        cat "$output" >&2
        rm -f "$output"
        return 1
    fi
    rm -f "$output"
}

# apt_install REASON PACKAGE...
apt_install() {
    local reason=$1
    shift
    command -v apt-get >/dev/null ||
        fail "$reason, and there is no apt-get here." "Install what Debian calls: $*"
    [ "$(id -u)" -eq 0 ] ||
        fail "$reason. As root, run:" "apt-get install --no-install-recommends $*" "and then start this again."
    step "Debian packages: installing $*"
    export DEBIAN_FRONTEND=noninteractive
    # Quicker without asking for new lists, but old lists may name packages that are gone.
    apt-get install -y --no-install-recommends "$@" >/dev/null 2>&1 </dev/null ||
        { quietly apt-get update && quietly apt-get install -y --no-install-recommends "$@"; } ||
        fail "apt-get could not install: $*"
}

have_packages() {
    local missing=()
    # Alone: it takes the place of the old package `fuse`.
    command -v fusermount3 >/dev/null || missing+=(fuse3)
    command -v getfattr >/dev/null || missing+=(attr)
    [ ${#missing[@]} -eq 0 ] || apt_install "missing: ${missing[*]}" "${missing[@]}"
    step "Debian packages: fuse3 ($(fusermount3 --version 2>&1 | grep -o '[0-9.]*$')), attr"
}

have_device() {
    if [ ! -c /dev/fuse ] && [ "$(id -u)" -eq 0 ]; then
        modprobe fuse 2>/dev/null || true
        if [ ! -c /dev/fuse ] && grep -qw fuse /proc/filesystems; then
            mknod -m 0666 /dev/fuse c 10 229 2>/dev/null || true
        fi
    fi
    [ -c /dev/fuse ] || fail "/dev/fuse is missing, so nothing can be mounted here." \
        "On a machine of your own, as root: modprobe fuse" \
        "In a container: start it with --device /dev/fuse --cap-add SYS_ADMIN"
    [ -r /dev/fuse ] && [ -w /dev/fuse ] || fail "/dev/fuse may not be opened by $(id -un)." \
        "As root, run: chmod 0666 /dev/fuse"
    step "/dev/fuse: there"
}

is_fit() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

can_make_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

find_python() {
    local name found=
    # TensorFlow is slow to follow a new Python, so python3 itself comes after those it is known to have.
    for name in ${HUBFS_PYTHON:-python3.12 python3.11 python3.13 python3.10 python3}; do
        if is_fit "$name"; then
            if can_make_venv "$name"; then
                echo "$name"
                return
            fi
            found=${found:-$name}
        fi
    done
    [ -n "$found" ] || fail "no Python 3.10 or newer was found (looked for ${HUBFS_PYTHON:-python3.x, python3})." \
        "On Debian 12, Ubuntu 22.04 and newer: apt-get install python3 python3-venv"
    echo "$found"
}

have_venv() {
    local python version
    if [ ! -x "$venv/bin/python" ] || ! is_fit "$venv/bin/python"; then
        python=$(find_python)
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        can_make_venv "$python" || apt_install "Python $version cannot make virtual environments" "python$version-venv"
        step "virtual environment: making $venv with Python $version"
        quietly "$python" -m venv --clear "$venv" || fail "$python could not make $venv"
    fi
    step "virtual environment: $venv, Python $("$venv/bin/python" -c 'import platform; print(platform.python_version())')"
}

# What decides which packages are wanted, and where hubfs is.
wanted() {
    { cat "$checkout/pyproject.toml"; echo "$checkout $extras"; "$venv/bin/python" --version; } | sha256sum
}

have_hubfs() {
    local stamp=$venv/hubfs-setup.sha256 size
    if [ ! -x "$venv/bin/hubfs" ] || [ "$(cat "$stamp" 2>/dev/null)" != "$(wanted)" ]; then
        case $extras in *tensorflow*) size=" (2 GB; some minutes)" ;; esac
        step "Python packages: installing hubfs and what its extras $extras want${size:-}"
        rm -f "$stamp"
        quietly "$venv/bin/python" -m pip install --disable-pip-version-check --no-input \
            --editable "${checkout}[$extras]" || fail "pip could not install them; its output is above."
        wanted >"$stamp"
    fi
    step "Python packages: $("$venv/bin/hubfs" --version), and what its extras $extras want"
}

have_packages
have_device
have_venv
have_hubfs
export PATH="$venv/bin:$PATH"
