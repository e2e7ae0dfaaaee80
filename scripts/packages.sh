#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Installs what the project needs from the machine's own Debian (12 or 13):
# only packages that are missing, as root or with sudo. A stamp in the cache
# makes the next run instant; it is keyed by this file, so that a package
# added below is noticed.
#
#   scripts/packages.sh          install what is missing
#   scripts/packages.sh --list   print the list
set -euo pipefail

# Add a package to the list of what needs it. A package that Debian 12 and 13
# name differently is written "name12|name13": the first one known is taken.
packages=(
    # the library: C compiler, meson build, header and symbol checks
    gcc libc6-dev make patch pkg-config ninja-build meson binutils git
    # fetching and unpacking
    ca-certificates curl xz-utils dpkg-dev rsync util-linux
    # QEMU
    python3 python3-venv python3-pip flex bison patchelf
    libglib2.0-dev zlib1g-dev libzstd-dev liburing-dev libaio-dev libseccomp-dev
    libfuse3-dev fuse3 libfdt-dev libpixman-1-dev libslirp-dev nettle-dev
    libcurl4-gnutls-dev
    # tests: memory checkers, clang's thread-safety analysis, disks and loops
    valgrind clang e2fsprogs fdisk kmod strace
    # guests: template and boot
    mmdebstrap cpio mount
)

die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

if [ "${1:-}" = --list ]; then
    printf '%s\n' "${packages[@]}"
    exit 0
fi
[ $# -eq 0 ] || die "unknown argument '$1'"

# Rust is the one thing that does not come from Debian: its rustc is too old.
rust_min=1.89
if [ -z "$(command -v cargo || true)" ] && [ -x "$HOME/.cargo/bin/cargo" ]; then
    PATH="$HOME/.cargo/bin:$PATH"
fi
rust_have=$(rustc --version 2>/dev/null | awk '{ print $2 }' || true)
if [ -z "$rust_have" ] || ! command -v cargo >/dev/null ||
   [ "$(printf '%s\n' "$rust_min" "$rust_have" | sort -V | head -n 1)" != "$rust_min" ]; then
    die "Rust $rust_min or newer is needed (found: ${rust_have:-none}); install it with rustup, https://rustup.rs"
fi

cache=${XDG_CACHE_HOME:-$HOME/.cache}/libfvd
# The stamp lies about a machine whose packages were replaced, so the release
# and the host's name are part of the key.
key=$( (cat "$0" /etc/os-release; uname -nm) | sha256sum | cut -c1-16)
stamp=$cache/stamps/packages-$key
[ -e "$stamp" ] && exit 0

command -v apt-get >/dev/null && command -v dpkg-query >/dev/null ||
    die "no apt-get here: on another distribution than Debian install these by hand: ${packages[*]}"

installed() {
    # "pkg-config" is only provided by another package on some releases.
    dpkg-query -W -f '${db:Status-Status} ${Package}\n' "$1" 2>/dev/null | grep -q '^installed ' ||
        dpkg-query -W -f '${db:Status-Status} ${Provides}\n' 2>/dev/null |
            grep '^installed ' | grep -qE "[ ,]$1( |,|\$)"
}
missing=()
for entry in "${packages[@]}"; do
    found=
    IFS='|' read -r -a names <<<"$entry"
    for name in "${names[@]}"; do
        installed "$name" && found=1
    done
    [ -n "$found" ] || missing+=("$entry")
done

if [ ${#missing[@]} -gt 0 ]; then
    as_root=()
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null ||
            die "not root and no sudo; install these packages first: ${missing[*]}"
        as_root=(sudo)
    fi
    # An interrupted apt elsewhere holds the lock for a while: wait for it.
    apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300)
    "${apt[@]}" update -q
    chosen=()
    for entry in "${missing[@]}"; do
        IFS='|' read -r -a names <<<"$entry"
        pick=${names[0]}
        for name in "${names[@]}"; do
            if apt-cache show "$name" >/dev/null 2>&1; then
                pick=$name
                break
            fi
        done
        chosen+=("$pick")
    done
    printf 'installing: %s\n' "${chosen[*]}"
    "${apt[@]}" install -q -y --no-remove --no-install-recommends "${chosen[@]}" ||
        die "apt-get could not install: ${chosen[*]}"
fi

mkdir -p "$cache/stamps"
touch "$stamp"
