#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# The tests of fvd-capi and the fuzz corpus under AddressSanitizer and LeakSanitizer, which need an
# unstable flag: RUSTC_BOOTSTRAP lets a stable compiler take it. Not part of `make test`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export RUSTC_BOOTSTRAP=1 RUSTFLAGS='-Zsanitizer=address' RUST_BACKTRACE=0
host=$(rustc -vV | sed -n 's/^host: //p')
# Its own folder: flags differ. With --target, build scripts and macros stay without the sanitizer.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/asan
# c_smoke links C programs with the plain C compiler; they run under gcc's sanitizers in c-tests.
cargo test -q --locked --target "$host" -p fvd-capi --lib
cargo test -q --locked --target "$host" -p fvd-fuzz --test replay
