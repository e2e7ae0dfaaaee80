#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Every test, in order of cost. Stops at nothing, ends with a summary; the exit status says whether
# all passed. FVD_TEST_ONLY="name name" runs some.
set -uo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$top" || exit 1
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/libfvd/target}
PATH=$HOME/.cargo/bin:$PATH

passed=0 failed=0
failures=()
step() { # name, command...
    local name=$1
    shift
    if [ -n "${FVD_TEST_ONLY:-}" ] && [[ " $FVD_TEST_ONLY " != *" $name "* ]]; then return; fi
    printf '\n=== %s\n' "$name"
    local started=$SECONDS
    if "$@"; then
        passed=$((passed + 1))
        printf '=== %s: ok (%s s)\n' "$name" $((SECONDS - started))
    else
        failed=$((failed + 1))
        failures+=("$name")
        printf '=== %s: FAILED (%s s)\n' "$name" $((SECONDS - started))
    fi
}

# The simulator and the fuzz bodies switch on planted faults: apart, so that all else is tested without.
step rust cargo test --workspace --exclude xtask --exclude fvd-sim --exclude fvd-fuzz --locked -q
step fuzz-replay cargo test -q --locked -p fvd-fuzz --test replay
step sim-tests cargo test -q --locked --release -p fvd-sim
step sim scripts/sim.sh --test
step loom env RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR="$CARGO_TARGET_DIR/loom" cargo test -q --locked --release -p fvd-engine --lib --test loom_brackets
step open-cost cargo test -q --locked --release -p fvd-fuzz --test open_cost
step header cargo run -q --locked -p xtask -- header --check
step tidy cargo run -q --locked -p xtask -- tidy
step c-tests scripts/c-tests.sh
step features scripts/qemu-features-test.sh
# Leaves a guest template in the cache, which a test below uses.
step boot scripts/run-vm.sh
for script in tests/qemu/*.py; do
    case ${script##*/} in common.py | writelog.py) continue ;; esac
    step "qemu/$(basename "$script" .py)" python3 -B "$script"
done
step counts python3 -B bench/test-counts.py
step iotests tests/iotests/run.sh
step iotests-compact tests/iotests/run.sh --compact

printf '\n'
[ ${#failures[@]} -eq 0 ] || printf 'failed: %s\n' "${failures[*]}"
printf '%s passed, %s failed\n' "$passed" "$failed"
[ "$failed" -eq 0 ]
