"""Command line of the benchmarks: ``python -m bench <suite> --json FILE``."""

from __future__ import annotations

import argparse
import importlib

import torch

from .harness import Report

SUITES = ("accumulate", "checkpoint", "cycle", "gpu", "policies", "rollback", "state8", "state8_loss", "step", "train")


def main() -> None:
    """Run one suite and write its records."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--json", metavar="FILE", help="write the records here")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds, at least 7 (default 9)")
    parser.add_argument("--part", help="of a suite that has parts; its records replace their namesakes in FILE")
    args = parser.parse_args()
    if args.rounds < 7:
        parser.error(f"--rounds is {args.rounds}, expected at least 7: the minimum of fewer means little here")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no GPU; use --device cpu")
    suite = importlib.import_module(f"bench.{args.suite}")
    parts = getattr(suite, "PARTS", {})
    if args.part is not None and args.part not in parts:
        parser.error(f"--part is {args.part}, expected {' or '.join(parts) or 'none, for this suite has no parts'}")
    report = Report(args.suite, torch.device(args.device))
    if args.part is None:
        suite.run(report, args.rounds)
        report.write(args.json)
    else:
        suite.run(report, args.rounds, args.part)
        report.write_into(args.json)


if __name__ == "__main__":
    main()
