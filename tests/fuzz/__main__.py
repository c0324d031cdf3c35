"""`make fuzz`: every target for its share of the time, on all cores; a table, and what was found, kept under `cases/`."""

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from .run import fuzz, keep
from .targets import BY_NAME, TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m shoestring.tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="of wall time, for all targets together (default: 600)")
    parser.add_argument("--seed", type=int, default=None, help="another one gives other inputs (default: the time)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="targets at a time (default: one per core)")
    parser.add_argument("--target", action="append", choices=list(BY_NAME), help="only this one; may be given again")
    args = parser.parse_args()
    targets = [BY_NAME[name] for name in args.target] if args.target else TARGETS
    seed = int(time.time()) if args.seed is None else args.seed
    each = args.seconds * min(args.workers, len(targets)) / len(targets)
    for target in targets:  # made once, and not by each process
        target.seeds(), target.beside()
    print(f"{len(targets)} targets, {each:.1f} s each, seed {seed}\n")
    print(f"{'target':34} {'inputs':>8} {'refused':>8} {'corpus':>7} {'lines':>6}  found")
    found = []
    with ThreadPoolExecutor(args.workers) as pool:
        for result in pool.map(lambda target: fuzz(target, each, seed), targets):
            lines = f"{result.lines:,}" if result.lines else "-"
            print(f"{result.target:34} {result.runs:8,} {result.refused:8,} {result.kept:7,} {lines:>6}  {len(result.findings) or '-'}",
                  flush=True)  # fmt: skip
            found += result.findings
    for finding in found:
        print(f"\n== {finding.target}: {finding.kind}\n   kept as {keep(finding)}\n{finding.what}")
    print(f"\n{len(found)} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
