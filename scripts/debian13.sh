#!/usr/bin/env bash
# Runs a command in Debian 13 (libfuse 3.17, Python 3.13), in this checkout, with hubfs in it. Needs root.
#
#     scripts/debian13.sh python -m pytest tests/mount
#     scripts/debian13.sh hubfs doctor
#     scripts/debian13.sh bash                 to look around
#
#     HUBFS_DEBIAN13=DIR                       where that Debian is kept (default: /var/cache/hubfs-debian13)
#
# The first time makes it with debootstrap (300 MB, a minute), and a virtual environment .venv-debian13 in the
# checkout (without TensorFlow). All files but those of the system (/usr, /etc, /var) are the machine's own.
# Processes that the command leaves behind, and everything mounted, end with this script, even if it is killed.
#
# Exit code: the command's. 77 without root or apt-get, 1 if Debian 13 could not be made ready, 2 without a command.

set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
kept=$(realpath -m "${HUBFS_DEBIAN13:-/var/cache/hubfs-debian13}")
root=$kept/root
venv=$checkout/.venv-debian13
# What hubfs needs, and what its tests run.
packages=ca-certificates,python3,python3-venv,fuse3,libfuse3-4,attr,e2fsprogs,rsync,libarchive-tools,procps
export PATH=$PATH:/usr/sbin:/sbin

say() { printf 'debian13: %s\n' "$*" >&2; }

# Of what is told, the lines worth seeing.
only() { sed -u -n "/$1/p" >&2; }

# fail EXIT-CODE MESSAGE
fail() {
    say "$2"
    exit "$1"
}

is_made() { [ "$(cat "$root/etc/hubfs-packages" 2>/dev/null)" = "$packages" ]; }

have_debootstrap() {
    ! command -v debootstrap >/dev/null || return 0
    command -v apt-get >/dev/null || fail 77 "needs debootstrap, and there is no apt-get here to install it with."
    say "installing debootstrap"
    local install=(apt-get install -y --no-install-recommends debootstrap debian-archive-keyring)
    export DEBIAN_FRONTEND=noninteractive
    "${install[@]}" >/dev/null 2>&1 </dev/null ||
        { apt-get -qq update && "${install[@]}" -qq; } >&2 </dev/null ||
        fail 1 "apt-get could not install debootstrap."
}

# The first Debian mirror that apt knows, in whatever form it was told of it; nothing if there is none.
mirror() {
    command -v apt-get >/dev/null || return 0
    # shellcheck disable=SC2016  # apt fills this in
    local ask=(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian')
    # It can tell whose mirrors those are only once it has been there.
    { "${ask[@]}" | grep . || { apt-get -qq update >&2 </dev/null && "${ask[@]}"; }; } |
        awk '/^(https?|file):/ && !found++' || true
}

# Whole or not at all: it has its name only once it is complete.
make_root() {
    local new=$kept/new old=$kept/old from
    say "making $root with debootstrap (300 MB, about a minute)"
    rm -rf --one-file-system "$new" "$old"
    from=$(mirror)
    # shellcheck disable=SC2086  # no mirror is no argument
    with_proxies_of_apt debootstrap --variant=minbase --include="$packages" --force-check-gpg \
        trixie "$new" $from </dev/null 2>&1 | only '^[EW]:' || {
        tail -n 20 "$new/debootstrap/debootstrap.log" >&2 || true
        fail 1 "debootstrap could not make $new"
    }
    rm -f "$new"/var/cache/apt/archives/*.deb
    echo "$packages" >"$new/etc/hubfs-packages"
    # Commands may be running in an older one, so that is removed the next time.
    [ ! -e "$root" ] || mv -T "$root" "$old"
    mv -T "$new" "$root"
}

with_proxies_of_apt() {
    local http='' https=''
    if command -v apt-config >/dev/null; then
        eval "$(apt-config shell http Acquire::http::Proxy https Acquire::https::Proxy)"
    fi
    http_proxy=${http_proxy:-${http#DIRECT}} https_proxy=${https_proxy:-${https#DIRECT}} "$@"
}

# Makes a path of the machine visible in there, under its own name.
bind() {
    if [ ! -e "$1" ] || [ "$1" -ef "$root$1" ] || [ "$1" -ef / ]; then return 0; fi
    if [ -d "$1" ]; then
        mkdir -p "$root$1"
    else
        mkdir -p "$(dirname "$root$1")"
        [ -e "$root$1" ] || touch "$root$1"
    fi
    mount --rbind "$1" "$root$1"
}

# Everything but the system itself is the machine's.
bind_all() {
    local path
    mount --bind "$root" "$root"
    mount -t proc proc "$root/proc"
    mount -t tmpfs -o mode=755 tmpfs "$root/run"
    # Without it fusermount3 does not unmount for users.
    ln -sfn /proc/self/mounts "$root/etc/mtab"
    for path in /*; do
        case $path in
            /bin | /boot | /etc | /lib* | /lost+found | /proc | /run | /sbin | /usr | /var) ;;
            *) [ ! -d "$path" ] || bind "$path" ;;
        esac
    done
    for path in "$checkout" ~ "${TMPDIR:-/tmp}" /etc/resolv.conf /etc/hosts; do
        bind "$path"
    done
    paths_of_settings | sort -u | while read -r path; do
        # Directories like /etc/ssl/certs are the system's.
        case $path in
            /usr/local/* | /var/*) bind "$path" ;;
            *) [ -d "$path" ] || bind "$path" ;;
        esac
    done
}

# What the settings of pip and of TLS are in and what they name: indexes, wheels, certificates.
paths_of_settings() {
    local files=(/etc/pip.conf /etc/xdg/pip/pip.conf ~/.pip/pip.conf ~/.config/pip/pip.conf)
    files+=("${XDG_CONFIG_HOME:-/etc}/pip/pip.conf" "${PIP_CONFIG_FILE:-/etc/pip.conf}")
    printf '%s\n' "${files[@]}"
    { cat "${files[@]}" 2>/dev/null; env | grep -E '^(PIP_|SSL_CERT_|REQUESTS_CA_|CURL_CA_)'; } |
        grep -oE '(file://)?/[^][:space:],"'\'']*' | sed -E 's,^file://(localhost)?/,/,' || true
}

# A FUSE mount of the machine does not end while a copy of it is in our namespace.
leave_fuse_mounts() {
    local where path
    awk '{ for (i = 7; $i != "-"; i++); if ($(i + 1) ~ /^fuse(blk)?(\.|$)/) print $5 }' /proc/self/mountinfo |
        while read -r where; do
            where=$(printf '%b' "$where")
            for path in "$checkout" "$root" ~ "${TMPDIR:-/tmp}"; do
                case $path/ in "$where"/*) continue 2 ;; esac
            done
            umount --lazy --no-canonicalize "$where" || true
        done
}

# inside COMMAND...: runs it in there, in the checkout.
inside() {
    local unset=(HUBFS_PYTHON PYTHONHOME PYTHONPATH VIRTUAL_ENV LD_LIBRARY_PATH LD_PRELOAD)
    chroot "$root" env "${unset[@]/#/--unset=}" --chdir="$checkout" \
        LC_ALL=C.UTF-8 HUBFS_VENV="$venv" HUBFS_EXTRAS=dev \
        PATH="$venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" "$@"
}

# The first process of a namespace of its own: processes and mounts in it end with this one.
main() {
    local code=0
    leave_fuse_mounts
    mkdir -p "$kept"
    exec 9>"$kept/lock"
    flock --timeout 5 9 || { say "waiting for another one that makes it ready" && flock 9; }
    is_made || make_root
    bind_all
    # Tells only what takes time; where that is wrong is told in any case, on stderr.
    inside bash scripts/setup.sh </dev/null | only '==> .*: \(installing\|making\) ' ||
        fail 1 "hubfs could not be made ready in $root"
    exec 9>&-
    inside "$@" || code=$?
    exit "$code"
}

if [ "${HUBFS_DEBIAN13_INSIDE:-}" = yes ]; then
    unset HUBFS_DEBIAN13_INSIDE
    main "$@"
fi

[ $# -gt 0 ] || fail 2 "which command? See the head of ${BASH_SOURCE[0]}"
[ "$(id -u)" -eq 0 ] || fail 77 "needs root, to make a Debian 13 and to mount in it."
is_made || have_debootstrap
code=0
# If this script is killed, unshare is, and by that everything it started. A namespace ends with its first process.
HUBFS_DEBIAN13_INSIDE=yes setpriv --pdeathsig KILL \
    unshare --mount --pid --fork --kill-child --propagation private bash "${BASH_SOURCE[0]}" "$@" || code=$?
exit "$code"
