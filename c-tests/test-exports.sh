#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Both libraries export exactly what symbols.txt lists; the installed one with versions.
#
#   test-exports.sh SYMBOLS INSTALLED CDYLIB
set -euo pipefail
symbols=$1 installed=$2 cdylib=$3
want=$(grep -v '^#' "$symbols" | sort)

exports() { nm -D --defined-only "$1" | awk '$2 != "A" { print $3 }'; }

fail=0
for library in "$installed" "$cdylib"; do
    have=$(exports "$library" | sed 's/@.*//' | sort)
    if ! diff <(printf '%s\n' "$want") <(printf '%s\n' "$have"); then
        printf '%s: exports differ from %s\n' "$library" "$symbols" >&2
        fail=1
    fi
    readelf -d "$library" | grep -q 'SONAME.*\[libfvd\.so\.0\]' || {
        printf '%s: SONAME is not libfvd.so.0\n' "$library" >&2
        fail=1
    }
done
if exports "$installed" | grep -v '@@FVD_0$'; then
    printf '%s: symbols above have no version FVD_0\n' "$installed" >&2
    fail=1
fi
exit "$fail"
