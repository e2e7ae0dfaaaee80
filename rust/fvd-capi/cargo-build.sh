#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Called by meson: builds the library and the fvd tool in release (in one go: apart, cargo compiles
# everything twice) and copies what cargo made to where meson expects it. Meson calls it every time:
# cargo knows best whether something changed. What did not change is left alone, so that meson does
# not link anew.
#
#   cargo-build.sh SOURCE TARGET_DIR JOBS OUT_A OUT_SO OUT_TOOL
set -euo pipefail
source=$1 target=$2 jobs=$3 out_a=$4 out_so=$5 out_tool=$6

if [ -z "$(command -v cargo || true)" ] && [ -x "$HOME/.cargo/bin/cargo" ]; then
    PATH=$HOME/.cargo/bin:$PATH
fi
args=(build --release --locked -p fvd-capi -p fvd-cli --manifest-path "$source/Cargo.toml" --target-dir "$target")
[ "$jobs" = 0 ] || args+=(-j "$jobs")
# Flags meant for a test build would make another library.
env -u RUSTFLAGS cargo "${args[@]}"

place() { # from, to
    cmp -s "$1" "$2" || cp -f "$1" "$2"
}
place "$target/release/libfvd.a" "$out_a"
place "$target/release/libfvd.so" "$out_so"
place "$target/release/fvd" "$out_tool"
