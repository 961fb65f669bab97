"""The command: `python -m tests.oracle --faults 1000`. Prints a table; the exit code is 1 if anything is wrong."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import tests.oracle
from tests.oracle.deployments import DEPLOYMENTS, plan
from tests.oracle.result import Result, markdown
from tests.oracle.run import run_faults
from tests.tiny import build_tiny_base


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.oracle", description=tests.oracle.__doc__)
    parser.add_argument("--faults", type=int, default=1000, help="number of faults over all kinds (default 1000)")
    parser.add_argument("--on", choices=DEPLOYMENTS, help="only the faults of this deployment")
    parser.add_argument("--seed", type=int, default=0, help="seed of the clients and of the faults (default 0)")
    options = parser.parse_args()
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="imprint-oracle-") as name:
        base = build_tiny_base(Path(name) / "tiny")
        for deployment, faults in plan(options.faults).items():
            if options.on in (None, deployment) and faults.total():
                folder = Path(name) / deployment
                folder.mkdir()
                with DEPLOYMENTS[deployment](folder, str(base)) as running:
                    results.append(run_faults(running, faults, base, seed=options.seed))
    print(markdown(results))
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
