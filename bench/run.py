#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""All benchmarks; called by scripts/bench.sh, which builds the programs first."""

import argparse
import os
import sys

sys.dont_write_bytecode = True

import compact
import counts
import instructions
import journal
import mapped
import opens
import ratios
from common import BUILD, GIB, Failed, Place, Report, machine

SECTIONS = ("counts", "opens", "instructions", "journal", "mapped", "ratios")


def main():
    parser = argparse.ArgumentParser(prog="scripts/bench.sh")
    parser.add_argument("--quick", action="store_true", help="few rounds and small images: times are shown, not judged")
    parser.add_argument("--rounds", type=int, default=None, help="rounds A/B/B/A of each ratio (default: journal 15, pass-through 31; fewer than 15 are not judged)")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"sections: {','.join(SECTIONS)}")
    parser.add_argument("--programs", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--output", default=os.path.join(BUILD, "bench"), help="folder of report.txt and report.json")
    args = parser.parse_args()
    only = args.only.split(",")
    for name in only:
        if name not in SECTIONS:
            parser.error(f"no section '{name}'")

    def rounds(default):
        return args.rounds or (6 if args.quick else default)

    programs = {name: os.path.join(args.programs, name) for name in ("lookup", "open", "journal")}

    place = Place(2 * GIB if args.quick else 4 * GIB)
    out = Report()
    facts = machine()
    out.say(f"{facts['when']}  {facts['commit']}  {facts['qemu']}")
    out.say(f"{facts['cpus']} x {facts['cpu']}, Linux {facts['kernel']}, load {facts['load']:.1f}; images on {place.describe()}")
    if "counts" in only:
        counts.report(place, args.quick, out)
        compact.report(place, args.quick, out)
    if "opens" in only:
        opens.report(place, programs, out)
    if "instructions" in only:
        instructions.report(place, programs, args.quick, out)
    if "journal" in only:
        journal.report(place, programs, args.quick, rounds(15), out)
    if "mapped" in only:
        mapped.report(place, programs, args.quick, rounds(15), out)
    if "ratios" in only:
        ratios.report(place, args.quick, rounds(31), out)
    bad = out.finish(args.output)
    # A figure that is not reached is a result, not a failure of the measurement.
    print(f"report: {os.path.relpath(args.output)}/report.txt, report.json")
    return 0 if not bad or not os.environ.get("BENCH_STRICT") else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as error:
        sys.exit(f"bench: {error}")
