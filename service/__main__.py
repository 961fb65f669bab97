"""Runs the command line: `python -m service` is `imprint`."""

from service.cli.main import main

if __name__ == "__main__":
    main()
