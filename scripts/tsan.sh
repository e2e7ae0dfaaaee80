#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# ThreadSanitizer over the tests with real threads: the engine's, at their full length, and those of the
# host's file driver and of the C interface. The standard library is built with it too, whose mutexes it would not
# know otherwise. It does not see what a fence orders (Miri and loom do). A nightly compiler, so not part of `make test`:
#
#   rustup toolchain install nightly --component rust-src
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH=$HOME/.cargo/bin:$PATH
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/tsan
toolchain=${TSAN_TOOLCHAIN:-nightly}
[ -d "$(rustc "+$toolchain" --print sysroot)/lib/rustlib/src" ] || {
    echo "tsan.sh: toolchain '$toolchain' has no source: rustup toolchain install $toolchain --component rust-src" >&2
    exit 1
}
host=$(rustc "+$toolchain" -vV | sed -n 's/^host: //p')
export RUSTFLAGS=-Zsanitizer=thread RUST_BACKTRACE=0
# With --target, build scripts and macros stay without the sanitizer.
tsan() { cargo "+$toolchain" test --locked -Zbuild-std --target "$host" "$@"; }
tsan -p fvd-engine --test engine -- threads::
tsan -p fvd-host --tests
tsan -p fvd-capi --lib
