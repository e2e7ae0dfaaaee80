#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# `make bench`: the figures, side by side with raw and qcow2 in the same QEMU.
# Prints a report and writes it to build/bench/report.txt and report.json.
#
#   scripts/bench.sh                     everything, about a quarter of an hour
#   scripts/bench.sh --quick             in two minutes; times are not judged
#   scripts/bench.sh --only counts       what anyone can count, in half a minute; no times
#   scripts/bench.sh --only counts,opens some of: counts opens instructions journal mapped ratios
#   scripts/bench.sh --rounds 31         more rounds A/B/B/A
#
#   BENCH_FS=tmpfs|loop|disk   where the images are, instead of the best there is
#   BENCH_STRICT=1             exit 1 if a figure is not reached
#   FVD_BUILD=folder           another folder than build with bin/ and lib/
set -euo pipefail

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export FVD_BUILD=${FVD_BUILD:-$top/build}
FVD_BUILD=$(cd "$FVD_BUILD" && pwd) || exit 1
for need in bin/qemu-img bin/qemu-io bin/fvd lib/libfvd.so; do
    if [ ! -e "$FVD_BUILD/$need" ]; then
        echo "bench: no $need in $FVD_BUILD; run 'make build' first" >&2
        exit 1
    fi
done
"$top/scripts/packages.sh"

programs=$FVD_BUILD/bench/programs
mkdir -p "$programs"
for source in instructions/lookup programs/open programs/journal; do
    ${CC:-cc} -std=gnu11 -O2 -Wall -Wextra -Werror -fno-builtin-malloc -I "$top/include" \
        -o "$programs/${source##*/}" "$top/bench/$source.c" \
        -L "$FVD_BUILD/lib" -Wl,-rpath,"$FVD_BUILD/lib" -lfvd
done
exec python3 -B "$top/bench/run.py" --programs "$programs" "$@"
