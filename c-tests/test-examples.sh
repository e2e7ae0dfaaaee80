#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# The example programs do what they say.
#
#   test-examples.sh MAKE_IMAGE FVD_INFO FVD_COPY
set -euo pipefail
make_image=$1 info=$2 copy=$3
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

head -c 3000000 /dev/urandom >"$dir/base.raw"
truncate -s 5000192 "$dir/expected"
dd if="$dir/base.raw" of="$dir/expected" conv=notrunc status=none
head -c 4096 /dev/zero | tr '\0' x | dd of="$dir/expected" bs=4096 seek=3 conv=notrunc status=none

"$make_image" "$dir/disk.fvd" 5000192 base.raw
"$info" "$dir/disk.fvd" >"$dir/info"
grep -qx 'virtual size: 5000192 bytes' "$dir/info"
grep -qx 'closed cleanly: yes' "$dir/info"
grep -qx 'base: base.raw (raw)' "$dir/info"
"$copy" "$dir/disk.fvd" "$dir/out"
cmp "$dir/expected" "$dir/out"

# Errors are errors.
if "$info" "$dir/base.raw" 2>"$dir/error"; then exit 1; fi
grep -q 'base.raw' "$dir/error"
if "$copy" "$dir/none" "$dir/out2" 2>/dev/null; then exit 1; fi
