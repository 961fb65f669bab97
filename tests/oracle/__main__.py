"""The command: `python -m tests.oracle --faults 1000`. Prints a table; the exit code is 1 if anything is wrong."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import tests.oracle
from tests.oracle.deployments import plan
from tests.oracle.result import markdown
from tests.oracle.run import run_deployment
from tests.tiny import build_tiny_base

AT_A_TIME = 4  # deployments


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.oracle", description=tests.oracle.__doc__)
    parser.add_argument("--faults", type=int, default=1000, help="number of faults over all kinds (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the clients and of the faults (default 0)")
    options = parser.parse_args()
    workers = ProcessPoolExecutor(AT_A_TIME, multiprocessing.get_context("spawn"))
    with tempfile.TemporaryDirectory(prefix="imprint-oracle-") as name, workers:
        base = build_tiny_base(Path(name) / "tiny")
        planned = {deployment: faults for deployment, faults in plan(options.faults).items() if faults.total()}
        runs = [workers.submit(run_deployment, name, faults, base, options.seed) for name, faults in planned.items()]
        results = [run.result() for run in runs]
    print(markdown(results))
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
