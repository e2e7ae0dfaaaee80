#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# The C tests: against both libraries, under valgrind, and under ASan/UBSan.
set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=$top/build/meson
[ -e "$build/build.ninja" ] || "$top/scripts/build-lib.sh"
meson test -C "$build" --print-errorlogs "$@"
meson test -C "$build" --print-errorlogs --setup valgrind --suite installed
