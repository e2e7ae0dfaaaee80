#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Miri: undefined behaviour, and data races as Rust's memory model has them, fences included. The codec, the
# engine's parts, its tests with real threads (cut short: `cfg!(miri)`), the panic border, and the C
# interface as far as it needs no system call. A nightly component, so not part of `make test`:
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
# Property tests look for old failures in files. Tree Borrows: bitvec keeps a bit's number in a reference to
# nothing, which Stacked Borrows forbids.
export MIRIFLAGS="-Zmiri-disable-isolation -Zmiri-tree-borrows" PROPTEST_CASES=2 RUST_BACKTRACE=0
miri() { cargo "+$toolchain" miri test -q --locked "$@"; }
# All bits of a page, one by one, take an hour here.
miri -p fvd-format --lib -- --skip any_flipped_bit
# bitvec makes pointers of numbers, which Miri cannot follow: not where it is the oracle.
miri -p fvd-engine --lib -- --skip bitvec
miri -p fvd-engine --test panic
miri -p fvd-capi --lib
MIRIFLAGS+=" -Zmiri-many-seeds=0..${SEEDS:-4}" miri -p fvd-engine --test engine -- threads::
