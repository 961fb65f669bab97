"""A call of `imprint` within this process, which saves the seconds of a start: for commands that must fail."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Mapping

import pytest

from service.cli.main import main


def run_rejected(*arguments: object, settings: Mapping[str, object]) -> str:
    """Run a command that must fail, and return its one line of stderr.

    Args:
        arguments: the command line.
        settings: the IMPRINT_* variables, without their prefix.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith("IMPRINT_")}
    stderr = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(stderr):
        patch.setattr(os, "environ", clean | {f"IMPRINT_{name}": str(value) for name, value in settings.items()})
        patch.setattr(sys, "argv", ["imprint", *map(str, arguments)])
        with pytest.raises(SystemExit, match="1"):
            main()
    (line,) = stderr.getvalue().splitlines()
    assert line.startswith("imprint: ")
    return line
