"""`imprint` without a process of its own, which would cost seconds: for commands that are refused."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Mapping

import pytest

from service.cli.main import main


def run_rejected(*arguments: object, settings: Mapping[str, object]) -> str:
    """The one line of a command that fails as it should. settings: without their prefix."""
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
