#!/bin/bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# `make run` after the build: boots a guest from a copy-on-write disk over the Debian
# template, powers it off, kills it in the middle of writes, and checks what is left.
#
#   INTERACTIVE=1          a login on the guest's serial console instead of the checks
#   FORMAT=fvd             the disk's format (any that knows a backing file: qcow2, qed)
#   CREATE_OPTS=a=b,c=d    options for qemu-img create -o
#   DRIVE_OPTS=cache=none  more options for -drive
#   ACCEL=kvm|tcg          instead of trying whether KVM really works here
#   TEMPLATE=file          a raw template made elsewhere by make-template.sh
#   QEMU, QEMU_IMG         other binaries than build/bin's
#   VM_VERBOSE=1           the guest's console on stderr
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec python3 -B scripts/guest/run_vm.py
