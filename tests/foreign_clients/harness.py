"""Run the checks of one client's file, in the environment of the client: `python harness.py FILE URL MODEL`.

A check is a function of the file whose name begins with `check_`; it gets the server's address and the model's name.
For each check, one line of JSON is printed.
"""

import json
import runpy
import sys
import traceback


def main() -> None:
    """Run the checks."""
    file, url, model = sys.argv[1:]
    for name, check in runpy.run_path(file).items():
        if not name.startswith("check_"):
            continue
        error = None
        try:
            check(url, model)
        except Exception as raised:
            traceback.print_exc()
            error = f"{type(raised).__name__}: {raised}"
        print(json.dumps({"check": name.removeprefix("check_").replace("_", " "), "error": error}), flush=True)


if __name__ == "__main__":
    main()
