# SPDX-License-Identifier: MIT OR Apache-2.0
#
# What run.sh and grow.sh share: where QEMU's own tests are, how one run of
# them is started, and what it said. Sourced, not run.
#
# Environment: BIN_DIR (programs under test, default build/bin), JOBS (2), IMGOPTS (options of every image).

top=$(cd "$here/../.." && pwd)
bin=${BIN_DIR:-$top/build/bin}
# Several of the tests count seconds or run two QEMUs: more at once than
# processors makes them fail for no reason of ours.
jobs=${JOBS:-2}
imgopts=${IMGOPTS:-}
# `check` takes it as an argument only.
unset IMGOPTS

die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

for program in qemu-img qemu-io qemu-nbd qemu-storage-daemon qemu-system-x86_64; do
    [ -x "$bin/$program" ] || die "no $bin/$program (make build makes it)"
done
build=$("$top/scripts/qemu-build.sh" --print-build-dir)
[ -x "$build/tests/qemu-iotests/check" ] || die "no qemu-iotests in $build (make build makes them)"

# The tests' filters replace the format's name in their output: a scratch
# folder must not contain it.
base=${TMPDIR:-/tmp}
case $base in *fvd*) base=/tmp ;; esac
scratch=$(mktemp -d "$base/iotestsXXXXXX")
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' INT TERM

# names: the lines of a list without comments
names() { sed -e 's/#.*//' -e 's/[[:space:]]*$//' -e '/^$/d' "$1"; }

# run_check FORMAT TEST...: one run of `check`; its output in $scratch/log.
# The bare name selects a test in tests/.
run_check() {
    local format=$1 at=0 log=$scratch/log
    shift
    : >"$log"
    # In slices, so that the scratch folder stays small.
    local all=("${@#tests/}")
    while [ $at -lt ${#all[@]} ]; do
        local dir=$scratch/t$at
        mkdir "$dir"
        (
            cd "$build/tests/qemu-iotests"
            export QEMU_PROG=$bin/qemu-system-x86_64 QEMU_IMG_PROG=$bin/qemu-img QEMU_IO_PROG=$bin/qemu-io
            export QEMU_NBD_PROG=$bin/qemu-nbd QSD_PROG=$bin/qemu-storage-daemon TEST_DIR=$dir
            timeout "${IOTESTS_TIMEOUT:-900}" ./check "-$format" ${imgopts:+-o "$imgopts"} -j "$jobs" "${all[@]:at:40}"
        ) >>"$log" 2>&1 </dev/null || true
        rm -rf "$dir"
        at=$((at + 40))
    done
    # Its lines may begin with colour codes and end with timings.
    sed -i -e 's/\x1b\[[0-9;]*[A-Za-z]//g' -e 's/.*\r//' "$log"
}

# result TEST: pass, fail or "not run: why", from the log of the last run
result() {
    awk -v name="${1#tests/}" -v full="$1" '
        ($1 == name || $1 == full) && ($2 == "pass" || $2 == "fail" || $2 == "not") { line = $0; state = $2 }
        END {
            if (state == "not") { sub(/^[^ ]+ +not run */, "", line); sub(/^\[[^]]*\] */, "", line)
                                  sub(/^ *\.\.\. */, "", line); print "not run: " line }
            else print state == "" ? "no result" : state
        }' "$scratch/log"
}

# why TEST: the first differing lines that `check` printed for a failure. With
# -j they all come at the end, each test's under the name of its output file.
why() {
    awk -v name="/${1#tests/}.out.bad" '
        /^\+\+\+ / { on = substr($2, length($2) - length(name) + 1) == name; n = 0; next }
        /^--- / { on = 0; next }
        on && /^[-+]/ && n++ < 8 { print "#   " substr($0, 1, 200) }' "$scratch/log"
}
