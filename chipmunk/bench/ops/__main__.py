"""Operators on a GPU: `python -m chipmunk.bench.ops` checks each against float64, then times it against PyTorch.

    python -m chipmunk.bench.ops                        # check and time
    python -m chipmunk.bench.ops --only check
    python -m chipmunk.bench.ops --only time --variants all --json result.json
    python -m chipmunk.bench.ops --match swiglu         # only those

Errors are ‖out − exact‖ / ‖exact‖; the bound is twice that of PyTorch's own operators in the same dtype on the
same numbers. Uninitialised memory, outputs and workspaces alike, is filled with NaN first; each call is repeated and
must give the same bits. Times are medians of graph replays over several sets of inputs, so that none stays in L2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from chipmunk.bench.ops.checks import checks
from chipmunk.bench.ops.timing import prepare, time_cases


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m chipmunk.bench.ops", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("check", "prepare", "time"))
    parser.add_argument(
        "--variants", choices=("tuned", "all"), default="tuned", help="all: every design that was tried"
    )
    parser.add_argument(
        "--match", default="", help="only checks and cases whose name contains one of these, comma-separated"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=8, help="processes of `--only prepare`, which compiles ahead")
    parser.add_argument("--json", default=os.path.join(os.environ["OUT"], "ops.json") if "OUT" in os.environ else "")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "chipmunk.bench.ops needs a CUDA GPU (compute capability 8.0 or newer); none is visible.", file=sys.stderr
        )
        return 2
    if options.only == "prepare":
        prepare(options.variants, options.match, options.workers)
        return 0
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "torch": torch.__version__,
    }
    failed = 0
    if options.only != "time":
        report["checks"] = []
        for check in checks(options.match):
            report["checks"].append(asdict(check) | {"ok": check.ok})
            failed += not check.ok
            mark = "ok  " if check.ok else "FAIL"
            repeated = "" if check.repeatable else ", NOT REPEATABLE"
            print(f"{mark} {check.error:.2e} (≤ {check.bound:.2e}{repeated}) {check.name}", flush=True)
        print(f"{len(report['checks']) - failed} of {len(report['checks'])} checks passed", flush=True)
    if options.only != "check":
        report["times"] = time_cases(options.variants, options.match, options.repeats)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
