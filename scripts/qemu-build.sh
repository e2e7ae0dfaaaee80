#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Builds the patched QEMU and puts its programs into build/bin and its firmware
# into build/share/qemu. One build tree in the cache folder serves every
# checkout and is only ever brought up to date: files that did not change are
# not touched, so a changed block/fvd.c costs seconds and a changed patch what
# it affects.
#
#   scripts/qemu-build.sh                     build and install into build/
#   scripts/qemu-build.sh --without-fvd       the same without the driver (to and fro rebuilds half)
#   scripts/qemu-build.sh --print-build-dir   where the tree is (tests/qemu-iotests in it)
#   scripts/qemu-build.sh --clean             remove the tree
#
# JOBS=n: parallel compilers (default: all processors). V=1: show ninja's output.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(dirname "$here")
cache=${XDG_CACHE_HOME:-$HOME/.cache}/libfvd
jobs=${JOBS:-$(nproc)}

die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }
say() { printf '%s\n' "$*"; }

programs=(qemu-img qemu-io qemu-nbd storage-daemon/qemu-storage-daemon qemu-system-x86_64)

# Configured once for all that is to come: a changed line here is a new build
# tree and a full build. -g1: line numbers for backtraces and valgrind at a
# third of the size.
configure_line=(
    --python=/usr/bin/python3 --disable-download
    --without-default-features --disable-docs --disable-install-blobs
    --disable-user --enable-tools
    --disable-debug-info --extra-cflags=-g1
    --target-list=x86_64-softmmu
    --without-default-devices --with-devices-x86_64=fvd
    --enable-fdt=system --enable-kvm --enable-tcg --enable-pixman
    --enable-linux-io-uring --enable-linux-aio --enable-fuse --enable-fuse-lseek --enable-seccomp
    --enable-vhost-user --enable-vhost-user-blk-server
    --enable-coroutine-pool --enable-malloc-trim --enable-membarrier
    --enable-avx2 --enable-zstd --enable-replication
    --enable-qcow1 --enable-qed --enable-parallels --enable-vdi --enable-vhdx
    --enable-vmdk --enable-vpc --enable-vvfat
    --enable-bochs --enable-dmg --enable-cloop
    --enable-nettle --enable-curl --enable-slirp --enable-vnc
)

fvd=auto
action=build
for arg in "$@"; do
    case $arg in
        --without-fvd) fvd=disabled ;;
        --print-build-dir | --clean) action=$arg ;;
        *) die "unknown argument '$arg'" ;;
    esac
done

# What is in the key cannot change under a build tree; everything else can.
key=$({
    cat "$top/qemu-patch/QEMU_VERSION"
    printf '%s\n' "${configure_line[@]}"
    # shellcheck disable=SC1091
    (. /etc/os-release && echo "$ID $VERSION_ID")
    gcc -dumpfullversion -dumpmachine
} | sha256sum | cut -c1-12)
tree=$cache/qemu/$key
build=$tree/build

case $action in
    --print-build-dir)
        say "$build"
        exit 0 ;;
    --clean)
        rm -rf "$tree"
        exit 0 ;;
esac

mkdir -p "$tree"
exec 8>"$tree/.lock"
flock 8
log=$tree/build.log
: >"$log"

fail() {
    printf '\n%s failed; the end of %s:\n' "$1" "$log" >&2
    # What a person looks for first, then the context.
    grep -nE "(error|undefined reference|ERROR)[: ]" "$log" | tail -n 20 | cut -c1-300 >&2 || true
    tail -n 30 "$log" | cut -c1-300 >&2
    exit 1
}

# --- source ------------------------------------------------------------------
# A fresh patched tree is made beside the present one, and what differs is
# copied over: an unchanged file keeps its time stamp.

read -r version tarball wheels firmware < <("$here/qemu-fetch.sh") || die "QEMU could not be fetched"

source_stamp=$({
    echo "$version"
    cd "$top/qemu-patch"
    cat apply.sh QEMU_VERSION [0-9]*.patch
    find new -type f | LC_ALL=C sort
} | sha256sum)
if [ "$(cat "$tree/source.stamp" 2>/dev/null)" != "$source_stamp" ]; then
    say "preparing the source of QEMU $version"
    rm -f "$tree/source.stamp"
    rm -rf "$tree/fresh"
    mkdir "$tree/fresh"
    tar -xf "$tarball" --no-same-owner --strip-components=1 -C "$tree/fresh"
    mkdir -p "$tree/fresh/python/wheels"
    cp "$wheels"/*.whl "$tree/fresh/python/wheels/"
    bash "$top/qemu-patch/apply.sh" "$tree/fresh"
    if [ -d "$tree/src" ]; then
        # Content decides; time stamps of the tarball would look old to ninja.
        rsync -rlp --checksum --delete --omit-dir-times --exclude=__pycache__ \
            "$tree/fresh/" "$tree/src/"
        rm -rf "$tree/fresh"
    else
        mv "$tree/fresh" "$tree/src"
    fi
    echo "$source_stamp" >"$tree/source.stamp"
fi
bash "$top/qemu-patch/apply.sh" --new "$tree/src"

# --- the library -------------------------------------------------------------
# Copied beside the source: the tree must not point into one checkout.

sysroot=$tree/libfvd
lib=$top/build/lib
if [ "$fvd" = auto ] && [ -e "$top/qemu-patch/new/block/fvd.c" ]; then
    [ -e "$lib/libfvd.so" ] && [ -e "$lib/pkgconfig/libfvd.pc" ] && [ -e "$top/include/fvd.h" ] ||
        die "libfvd is not built (build/lib, include/fvd.h): run scripts/build-lib.sh first, or use --without-fvd"
    fvd=enabled
    mkdir -p "$sysroot/include" "$sysroot/lib/pkgconfig"
    cmp -s "$top/include/fvd.h" "$sysroot/include/fvd.h" || cp "$top/include/fvd.h" "$sysroot/include/"
    for file in "$lib"/libfvd.so*; do
        to=$sysroot/lib/${file##*/}
        if [ -L "$file" ]; then
            [ "$(readlink "$file")" = "$(readlink "$to" || true)" ] || cp -Pf "$file" "$to"
        elif ! cmp -s "$file" "$to"; then
            # A new file: a program that runs from the tree keeps the old one.
            cp "$file" "$to.part"
            mv "$to.part" "$to"
        fi
    done
    pc=$(printf 'prefix=%s\nName: libfvd\nDescription: FVD disk images\nVersion: %s\nCflags: -I${prefix}/include\nLibs: -L${prefix}/lib -lfvd\n' \
        "$sysroot" "$(PKG_CONFIG_PATH=$lib/pkgconfig pkg-config --modversion libfvd)")
    [ "$(cat "$sysroot/lib/pkgconfig/libfvd.pc" 2>/dev/null)" = "$pc" ] ||
        printf '%s\n' "$pc" >"$sysroot/lib/pkgconfig/libfvd.pc"
elif [ "$fvd" = auto ]; then
    fvd=disabled
fi
[ "$fvd" = enabled ] || printf 'note: QEMU is built without the fvd driver\n' >&2

# --- configure and build -----------------------------------------------------

if [ ! -e "$tree/configured" ]; then
    say "configuring QEMU $version"
    rm -rf "$build"
    mkdir "$build"
    (cd "$build" && PKG_CONFIG_PATH=$sysroot/lib/pkgconfig "$tree/src/configure" \
        "${configure_line[@]}" --disable-fvd) >>"$log" 2>&1 || fail "QEMU's configure"
    echo disabled >"$tree/configured"
fi
if [ "$(cat "$tree/configured")" != "$fvd" ]; then
    (cd "$build" && ./pyvenv/bin/meson configure -Dfvd="$fvd") >>"$log" 2>&1 || fail "meson configure"
    echo "$fvd" >"$tree/configured"
fi

# Changed meson files first: only then are the steps known.
ninja -C "$build" build.ninja >>"$log" 2>&1 || fail "the configuration of QEMU"
# The whole build takes minutes: say so, and only if there is much to do.
steps=$(ninja -C "$build" -n "${programs[@]}" 2>/dev/null | grep -c '^\[' || true)
[ "$steps" -lt 20 ] || say "building QEMU $version: $steps steps on $jobs processors"
started=$SECONDS
if [ -n "${V:-}" ] || [ -t 1 ]; then
    ninja -C "$build" -j "$jobs" "${programs[@]}" 2>&1 | tee -a "$log" || fail "the build of QEMU"
else
    ninja -C "$build" -j "$jobs" "${programs[@]}" >>"$log" 2>&1 || fail "the build of QEMU"
fi
[ "$steps" -lt 20 ] || say "QEMU built in $((SECONDS - started)) s"

# --- into build/ -------------------------------------------------------------

mkdir -p "$tree/bin" "$top/build/bin" "$top/build/share"
for program in "${programs[@]}"; do
    name=${program##*/}
    ready=$tree/bin/$name
    if [ ! "$ready" -nt "$build/$program" ]; then
        cp "$build/$program" "$ready.part"
        strip --strip-debug "$ready.part"
        # The library is found beside the program wherever both are put.
        patchelf --set-rpath '$ORIGIN/../lib' "$ready.part"
        mv "$ready.part" "$ready"
    fi
    if ! cmp -s "$ready" "$top/build/bin/$name"; then
        cp "$ready" "$top/build/bin/$name.part"
        mv "$top/build/bin/$name.part" "$top/build/bin/$name"
    fi
done
# QEMU looks for ../share/qemu from its program by itself.
rsync -rl --checksum --delete "$firmware/share/" "$top/build/share/qemu/"
rsync -rl --checksum --delete "$firmware/doc/" "$top/build/share/qemu-firmware-doc/"
say "QEMU $version is in build/bin$([ "$fvd" = enabled ] || echo ' (without fvd)')"
