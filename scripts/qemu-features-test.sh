#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Tries in build/bin what the project and its users count on from QEMU beside
# the fvd driver, so that a changed configure line cannot lose it unseen. Each
# check uses the feature; a name in a help text is not enough.
#
#   scripts/qemu-features-test.sh [--without-fvd] [BIN-DIR]
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
want_fvd=1
if [ "${1:-}" = --without-fvd ]; then
    want_fvd=
    shift
fi
bin=$(cd "${1:-$here/../build/bin}" && pwd)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Firmware and library must be found from anywhere.
cd "$work"

passed=0
failed=0
check() { # name command...
    local name=$1
    shift
    local status
    # Not as an if's condition: set -e would be off inside.
    set +e
    (set -e; "$@") >"$work/out" 2>&1
    status=$?
    set -e
    if [ "$status" -eq 0 ]; then
        passed=$((passed + 1))
        printf 'ok      %s\n' "$name"
    else
        failed=$((failed + 1))
        printf 'FAILED  %s\n' "$name"
        sed 's/^/        /' "$work/out" | tail -n 15
    fi
}

# Starts the machine stopped, asks the monitor, quits. $1: monitor command,
# $2: what its answer must contain, rest: arguments of the machine.
machine() {
    local ask=$1 expect=$2
    shift 2
    printf '%s\nquit\n' "$ask" | timeout 60 "$bin/qemu-system-x86_64" \
        -machine q35 -accel tcg -m 32 -S -nodefaults -display none -monitor stdio "$@" | tee "$work/answer"
    grep -q -- "$expect" "$work/answer"
}

luks() {
    local key=(--object "secret,id=k,data=abc")
    "$bin/qemu-img" create -q -f luks "${key[@]}" -o key-secret=k,iter-time=10 luks.img 1M
    "$bin/qemu-io" "${key[@]}" -c 'write -P 7 0 64k' --image-opts driver=luks,key-secret=k,file.filename=luks.img
    "$bin/qemu-io" "${key[@]}" -c 'read -P 7 0 64k' --image-opts driver=luks,key-secret=k,file.filename=luks.img >luks.out
    if grep -q 'verification failed' luks.out; then return 1; fi
    grep -q 'read 65536/65536' luks.out
    # And encrypted it must be.
    if LC_ALL=C grep -qaP '\x07{4096}' luks.img; then return 1; fi
}

nbd() {
    local ok=1 pid
    truncate -s 1M nbd.img
    "$bin/qemu-nbd" -f raw -k "$work/nbd.sock" nbd.img &
    pid=$!
    for _ in $(seq 100); do
        [ -S nbd.sock ] && break
        sleep 0.1
    done
    "$bin/qemu-io" -f raw -c 'write -P 9 4k 4k' -c flush "nbd+unix:///?socket=$work/nbd.sock" || ok=
    kill "$pid" 2>/dev/null || true
    wait "$pid" || true
    [ -n "$ok" ]
    "$bin/qemu-io" -f raw -c 'read -P 9 4k 4k' nbd.img >nbd.out
    if grep -q 'verification failed' nbd.out; then return 1; fi
    grep -q 'read 4096/4096' nbd.out
}

https() {
    # Nothing listens on port 1: curl's refusal shows that the driver is there.
    if timeout 60 "$bin/qemu-img" info https://127.0.0.1:1/disk.img >https.out 2>&1; then return 1; fi
    cat https.out
    if grep -qi 'unknown protocol' https.out; then return 1; fi
    grep -qi 'connect' https.out
}

vq_mapping() {
    truncate -s 1M vq.img
    machine 'info qtree' 'num-queues = 2' \
        -object iothread,id=t0 -object iothread,id=t1 \
        -blockdev driver=file,filename=vq.img,node-name=d \
        -device '{"driver":"virtio-blk-pci","drive":"d","num-queues":2,"iothread-vq-mapping":[{"iothread":"t0"},{"iothread":"t1"}]}'
}

firmware() {
    # The plain machine loads BIOS, VGA BIOS and the ROM of its network card.
    timeout 60 "$bin/qemu-system-x86_64" -accel tcg -m 64 -display none -no-reboot \
        -nic user,model=virtio-net-pci -chardev file,id=log,path=bios.log \
        -device isa-debugcon,iobase=0x402,chardev=log &
    local pid=$!
    for _ in $(seq 300); do
        grep -q 'Booting from' bios.log 2>/dev/null && break
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    kill "$pid" 2>/dev/null || true
    wait "$pid" || true
    grep 'Booting from' bios.log
    grep 'Running option rom at c' bios.log
}

aio() {
    truncate -s 1M aio.img
    "$bin/qemu-io" -f raw -t none "$@" -c 'read 0 4k' aio.img >aio.out
    grep 'read 4096/4096' aio.out
}

vnc() {
    machine 'info vnc' 'vnc.sock' -device VGA -vnc "unix:$work/vnc.sock"
}

devices() {
    machine 'info qtree' 'dev: pci-bridge' -device VGA -device virtio-net-pci -device e1000 \
        -device virtio-balloon-pci -device virtio-rng-pci -device virtio-serial-pci -device virtio-scsi-pci \
        -device ich9-ahci -device qemu-xhci -device usb-tablet -device pcie-root-port,id=rp1,slot=1 \
        -device pci-bridge,chassis_nr=2
}

runpath() {
    local program
    for program in qemu-img qemu-io qemu-nbd qemu-storage-daemon qemu-system-x86_64; do
        readelf -d "$bin/$program" | grep -E 'R(UN)?PATH' | tee runpath.out
        [ "$(wc -l <runpath.out)" = 1 ] && grep -qF '[$ORIGIN/../lib]' runpath.out || return 1
    done
}

fvd_formats() {
    local program
    "$bin/qemu-img" --help | grep -E '^Supported formats:.* fvd( |$)'
    # The driver is linked into each of the programs.
    for program in qemu-io qemu-nbd qemu-storage-daemon qemu-system-x86_64; do
        readelf -d "$bin/$program" | grep -q 'NEEDED.*libfvd\.so' || return 1
    done
}

check 'luks: create, write, read back' luks
check 'nbd: serve and write' nbd
check 'https is a known protocol' https
check 'virtio-blk iothread-vq-mapping, two queues on two iothreads' vq_mapping
check '-nic user' machine 'info network' 'user' -nic user,model=virtio-net-pci
check 'firmware is found by the plain machine' firmware
check 'vnc' vnc
check 'devices of an ordinary guest' devices
for format in bochs dmg cloop qed qcow2 vmdk; do
    check "format $format" grep -E "^Supported formats:.* $format( |\$)" <("$bin/qemu-img" --help)
done
check 'aio=io_uring' aio -i io_uring
check 'aio=native' aio -i native
check 'programs look for the library beside themselves only' runpath
if [ -n "$want_fvd" ]; then
    check 'fvd is in every program' fvd_formats
fi

printf '%d passed, %d failed\n' "$passed" "$failed"
[ "$failed" -eq 0 ]
