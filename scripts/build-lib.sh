#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Builds libfvd and the fvd tool, in release:
#
#   build/meson                     meson's build directory
#   build/lib/libfvd.so{,.0,.0.1.0} the library with symbol versions
#   build/lib/pkgconfig/libfvd.pc   for building against this tree
#   build/bin/fvd                   the tool
#
# Cargo builds in $FVD_TARGET_DIR (default: in the cache folder), so that `make clean` does not
# cost a full build. JOBS=n limits the processors used.
set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=${FVD_TARGET_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/libfvd/target}
build=$top/build/meson
jobs=${JOBS:-0}
if [ -z "$(command -v cargo || true)" ] && [ -x "$HOME/.cargo/bin/cargo" ]; then
    PATH=$HOME/.cargo/bin:$PATH
fi

options=(--prefix=/usr/local --libdir=lib --buildtype=debugoptimized
    -Dcargo_target_dir="$target" -Dcargo_jobs="$jobs" -Dtests=true)
log=$top/build/meson-setup.log
mkdir -p "$top/build" "$target"
# Two of them in one build directory would spoil ninja's records.
exec 9>"$top/build/.lock"
flock 9
if [ ! -e "$build/build.ninja" ] || ! meson setup --reconfigure "$build" "$top" "${options[@]}" >"$log" 2>&1; then
    # No build directory, or one of another meson or another place.
    rm -rf "$build"
    meson setup "$build" "$top" "${options[@]}" >"$log" 2>&1 || {
        cat "$log" >&2
        exit 1
    }
fi
# The tests are built when they are run.
version=$(sed -n "s/^  version: '\(.*\)',/\1/p" "$top/meson.build")
ninja -C "$build" "libfvd.so.$version"

# By rename, and only if it changed: a program may be running from there, or be built against it.
place() { # from, to, mode
    cmp -s "$1" "$2" && return
    install -m "$3" "$1" "$2.new"
    mv -f "$2.new" "$2"
}
mkdir -p "$top/build/lib/pkgconfig" "$top/build/bin"
place "$build/libfvd.so.$version" "$top/build/lib/libfvd.so.$version" 755
ln -sfn "libfvd.so.$version" "$top/build/lib/libfvd.so.0"
ln -sfn libfvd.so.0 "$top/build/lib/libfvd.so"
place "$build/rust/fvd-capi/fvd" "$top/build/bin/fvd" 755

pc=$(mktemp)
trap 'rm -f "$pc"' EXIT
cat >"$pc" <<END
prefix=$top/build
libdir=\${prefix}/lib
includedir=$top/include

Name: libfvd
Description: FVD virtual-disk images
Version: $version
Libs: -L\${libdir} -lfvd
Cflags: -I\${includedir}
END
place "$pc" "$top/build/lib/pkgconfig/libfvd.pc" 644
printf 'libfvd %s is in build/lib, the fvd tool in build/bin\n' "$version"
