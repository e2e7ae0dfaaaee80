# SPDX-License-Identifier: MIT OR Apache-2.0
#
# The way in for people; every target is a script that can be run alone.
#
#   make run               build all, make a VM from a Debian template, boot it
#   make run INTERACTIVE=1 the same, and leave a login on the serial console
#   make test              build all, run every test
#   make build             libfvd, the fvd tool, the patched QEMU: build/bin, build/lib
#   make sim HOURS=n       the simulator with fresh seeds on all cores, for n hours
#   make torture MINUTES=n SIGKILL and power cuts with fresh seeds, for n minutes
#   make bench             the figures beside raw and qcow2
#   make install           libfvd, header, fvd tool to PREFIX (default /usr/local)
#   make install-qemu      the patched QEMU to PREFIX (default /opt/qemu-fvd)
#   make clean             remove build/; the cache folder stays
#
# JOBS=n limits the processors used.

SHELL := /bin/bash
HOURS ?= 1
MINUTES ?= 10
export INTERACTIVE JOBS PREFIX DESTDIR V

.PHONY: all build packages lib qemu sim-build sim run test torture bench install install-qemu clean
all: build

packages:
	@scripts/packages.sh

lib: packages
	@scripts/build-lib.sh

qemu: lib
	@scripts/qemu-build.sh

sim-build: packages
	@scripts/sim.sh

build: lib qemu sim-build

sim: packages
	@scripts/sim.sh --hours $(HOURS)

run: build
	@scripts/run-vm.sh

test: build
	@scripts/test.sh

torture: build
	@scripts/torture.sh $(MINUTES)

bench: build
	@scripts/bench.sh

# Not dependent on build: `sudo make install` must not build as root.
install:
	@scripts/install-lib.sh

install-qemu:
	@scripts/install-qemu.sh

clean:
	rm -rf build target
