#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Installs the patched QEMU of build/bin into a prefix of its own, beside a
# QEMU of the distribution: programs, their library and firmware. The programs
# find both from where they are, so the folder can be moved as a whole.
#
#   PREFIX=/opt/qemu-fvd DESTDIR= scripts/install-qemu.sh
set -euo pipefail

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
prefix=${PREFIX:-/opt/qemu-fvd}
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

case $prefix in
    /*) ;;
    *) die "PREFIX must be an absolute path, not '$prefix'" ;;
esac
case $prefix in
    / | /usr | /usr/) die "PREFIX=$prefix belongs to the distribution's own QEMU; choose another" ;;
esac
dest=${DESTDIR:-}$prefix

programs=(qemu-img qemu-io qemu-nbd qemu-storage-daemon qemu-system-x86_64)
for program in "${programs[@]}"; do
    [ -x "$top/build/bin/$program" ] || die "build/bin/$program is not built; run make build first"
done

install -d "$dest/bin" "$dest/lib" "$dest/share/qemu/keymaps" "$dest/share/doc/qemu-fvd"
for program in "${programs[@]}"; do
    install -m 755 "$top/build/bin/$program" "$dest/bin/"
done
for lib in "$top"/build/lib/libfvd.so*; do
    [ -e "$lib" ] || continue
    cp -Pf "$lib" "$dest/lib/"
done
install -m 644 "$top"/build/share/qemu/*.bin "$top"/build/share/qemu/*.rom "$dest/share/qemu/"
install -m 644 "$top"/build/share/qemu/keymaps/* "$dest/share/qemu/keymaps/"
install -m 644 "$top"/build/share/qemu-firmware-doc/* "$dest/share/doc/qemu-fvd/"

# A program that cannot start here would not start for the user either.
"$dest/bin/qemu-img" --version >/dev/null || die "$dest/bin/qemu-img does not start"
printf 'QEMU with fvd is in %s/bin\n' "$dest"
