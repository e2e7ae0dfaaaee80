#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Miri: undefined behaviour, and data races as Rust's memory model has them, fences included. The codec, the
# engine's parts, its tests with real threads, the panic border, and the C interface as far as it needs no
# system call. Long tests are cut short where `cfg!(miri)`. A nightly component, so not part of `make test`:
#
#   rustup toolchain install nightly --component miri,rust-src
#
# SEEDS=n tries so many schedules of the tests with threads.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH=$HOME/.cargo/bin:$PATH
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/miri
toolchain=${MIRI_TOOLCHAIN:-nightly}
cargo "+$toolchain" miri --version >/dev/null 2>&1 || {
    echo "miri.sh: toolchain '$toolchain' has no miri: rustup toolchain install $toolchain --component miri,rust-src" >&2
    exit 1
}
# Without isolation: property tests look for old failures in files. Not -Zmiri-tree-borrows: it takes
# twenty times as long.
export MIRIFLAGS=-Zmiri-disable-isolation PROPTEST_CASES=2 RUST_BACKTRACE=0
miri() {
    local start=$SECONDS
    cargo "+$toolchain" miri test --locked "$@"
    echo "miri.sh: $*: $((SECONDS - start)) s"
}
miri -p fvd-format --lib
# Not where bitvec is the oracle: it keeps a bit's number in a reference to nothing.
miri -p fvd-engine --lib -- --skip bitvec
miri -p fvd-engine --test panic
miri -p fvd-capi --lib
MIRIFLAGS+=" -Zmiri-many-seeds=0..${SEEDS:-4}" miri -p fvd-engine --test engine -- threads::
