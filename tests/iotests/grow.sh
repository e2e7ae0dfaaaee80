#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Runs every candidate (candidates.txt) with -fvd and says which pass and are
# not yet in pass.txt, which fail or cannot run, and which of pass.txt do not
# pass any more (exit status 1).
#
#   tests/iotests/grow.sh            print
#   tests/iotests/grow.sh --add      also add what passes to pass.txt
#   tests/iotests/grow.sh NAME...    only these
#
# A test is added only if it passes three times: some depend on timing.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
add=
if [ "${1:-}" = --add ]; then add=1; shift; fi
. "$here/common.sh"

if [ $# -gt 0 ]; then tests=("$@"); else mapfile -t tests < <(names "$here/candidates.txt"); fi
declare -A listed
while read -r name; do listed[$name]=1; done < <(names "$here/pass.txt")

run_check fvd "${tests[@]}"
new=() lost=()
passed=0 failed=0 skipped=0
for name in "${tests[@]}"; do
    outcome=$(result "$name")
    case $outcome in
        pass)
            passed=$((passed + 1))
            [ -n "${listed[$name]:-}" ] || new+=("$name")
            ;;
        "not run"*)
            skipped=$((skipped + 1))
            printf '%-34s %s\n' "$name" "$outcome"
            [ -z "${listed[$name]:-}" ] || lost+=("$name")
            ;;
        *)
            failed=$((failed + 1))
            printf '%-34s %s\n' "$name" "$outcome"
            why "$name"
            [ -z "${listed[$name]:-}" ] || lost+=("$name")
            ;;
    esac
done

if [ ${#new[@]} -gt 0 ]; then
    steady=("${new[@]}")
    for _ in 1 2; do
        [ ${#steady[@]} -gt 0 ] || break
        run_check fvd "${steady[@]}"
        again=()
        for name in "${steady[@]}"; do
            if [ "$(result "$name")" = pass ]; then again+=("$name"); else printf '%-34s passes only sometimes\n' "$name"; fi
        done
        steady=("${again[@]}")
    done
    new=("${steady[@]}")
fi
[ ${#new[@]} -eq 0 ] || printf 'passes, not in pass.txt: %s\n' "${new[*]}"
[ ${#lost[@]} -eq 0 ] || printf 'in pass.txt, does not pass: %s\n' "${lost[*]}"
if [ -n "$add" ] && [ ${#new[@]} -gt 0 ]; then
    grep '^#' "$here/pass.txt" >"$scratch/pass.txt" || true
    { names "$here/pass.txt"; printf '%s\n' "${new[@]}"; } | sort -u >>"$scratch/pass.txt"
    cp "$scratch/pass.txt" "$here/pass.txt"
fi
printf '%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
[ ${#lost[@]} -eq 0 ]
