#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Called by meson: builds the library and the fvd tool in release (in one go: apart, cargo compiles
# everything twice) and copies what cargo made to where meson expects it, with cargo's list of
# sources as a depfile.
#
#   cargo-build.sh SOURCE TARGET_DIR JOBS OUT_A OUT_SO OUT_TOOL OUT_DEPFILE
set -euo pipefail
source=$1 target=$2 jobs=$3 out_a=$4 out_so=$5 out_tool=$6 out_d=$7

if [ -z "$(command -v cargo || true)" ] && [ -x "$HOME/.cargo/bin/cargo" ]; then
    PATH=$HOME/.cargo/bin:$PATH
fi
args=(build --release --locked -p fvd-capi -p fvd-cli --manifest-path "$source/Cargo.toml" --target-dir "$target")
[ "$jobs" = 0 ] || args+=(-j "$jobs")
# Flags meant for a test build would make another library.
env -u RUSTFLAGS cargo "${args[@]}"

cp -f "$target/release/libfvd.a" "$out_a"
cp -f "$target/release/libfvd.so" "$out_so"
cp -f "$target/release/fvd" "$out_tool"
# One rule with meson's output instead of cargo's.
{
    printf '%s:' "$out_a"
    sed -e 's/^[^:]*://' -e 1q "$target/release/libfvd.d" | tr -d '\n'
    sed -e 's/^[^:]*://' -e 1q "$target/release/fvd.d"
} >"$out_d"
