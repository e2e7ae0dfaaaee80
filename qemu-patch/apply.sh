#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Adds the fvd driver to a QEMU source tree: copies the files under new/ and
# applies the patches beside this script. Works on an unpacked 10.0.x.
#
#   qemu-patch/apply.sh SOURCE             patches and new files
#   qemu-patch/apply.sh --new SOURCE       new files only, and only those that differ
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

new_only=
if [ "${1:-}" = --new ]; then
    new_only=1
    shift
fi
[ $# -eq 1 ] || die "usage: ${0##*/} [--new] QEMU-SOURCE"
src=$1
[ -f "$src/VERSION" ] && [ -d "$src/block" ] || die "'$src' is not a QEMU source tree"

# A file is touched only if its content changes, so that a build tree on top
# of this source rebuilds only what it must.
while IFS= read -r -d '' file; do
    to=$src/${file#"$here/new/"}
    cmp -s "$file" "$to" && continue
    mkdir -p "$(dirname "$to")"
    cp "$file" "$to.part"
    if [ -x "$file" ]; then
        chmod 755 "$to.part"
    else
        chmod 644 "$to.part"
    fi
    mv "$to.part" "$to"
done < <(find "$here/new" -type f -print0)
[ -z "$new_only" ] || exit 0

series=$(cut -d. -f1,2 "$here/QEMU_VERSION")
case $(cat "$src/VERSION") in
    "$series".*) ;;
    *) printf 'warning: QEMU %s is not of the series %s these patches were made for\n' \
           "$(cat "$src/VERSION")" "$series" >&2 ;;
esac
for patch in "$here"/[0-9][0-9][0-9][0-9]-*.patch; do
    # -F3: line numbers and some context differ among the point releases.
    patch -d "$src" -p1 -F3 --forward --silent --no-backup-if-mismatch <"$patch" ||
        die "${patch##*/} does not apply to $src"
done
