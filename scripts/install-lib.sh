#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Installs what `make build` made: library, header, libfvd.pc and the fvd tool, below PREFIX
# (default /usr/local) and, for packagers, DESTDIR. Builds nothing.
set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
prefix=${PREFIX:-/usr/local}
to=${DESTDIR:-}$prefix

version=$(sed -n "s/^  version: '\(.*\)',/\1/p" "$top/meson.build")
for file in "build/lib/libfvd.so.$version" build/bin/fvd; do
    [ -e "$top/$file" ] || { printf '%s is missing: run make build first\n' "$file" >&2; exit 1; }
done
install -d "$to/lib/pkgconfig" "$to/include" "$to/bin"
install -m 755 "$top/build/lib/libfvd.so.$version" "$to/lib/"
ln -sfn "libfvd.so.$version" "$to/lib/libfvd.so.0"
ln -sfn libfvd.so.0 "$to/lib/libfvd.so"
install -m 644 "$top/include/fvd.h" "$to/include/"
install -m 755 "$top/build/bin/fvd" "$to/bin/"
cat >"$to/lib/pkgconfig/libfvd.pc" <<END
prefix=$prefix
libdir=\${prefix}/lib
includedir=\${prefix}/include

Name: libfvd
Description: FVD virtual-disk image engine
Version: $version
Libs: -L\${libdir} -lfvd
Cflags: -I\${includedir}
END
printf 'libfvd %s is in %s\n' "$version" "$to"
