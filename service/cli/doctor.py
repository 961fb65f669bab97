"""`imprint doctor`: prints what `service.cli.checks` finds."""

import json
import logging
from dataclasses import asdict

import typer
from rich.markup import escape

from service.cli.console import out
from service.cli.options import AsJson
from service.settings import Settings, SettingsError

STATUS_SYMBOLS = {"ok": "[green]✓[/green]", "warn": "[yellow]![/yellow]", "fail": "[red]✗[/red]"}


def doctor(as_json: AsJson = False) -> None:
    """Find what keeps a server from starting here, and say what to do. Exits with 1 if anything fails."""
    from service.cli.checks import Finding, run_checks

    logging.disable()  # every warning of a check is part of its finding
    try:
        findings = list(run_checks(Settings.load()))
    except SettingsError as error:
        findings = [Finding("settings", "fail", str(error), "docs/settings.md lists them all")]
    healthy = all(finding.status != "fail" for finding in findings)
    if as_json:
        print(json.dumps({"healthy": healthy, "findings": [asdict(finding) for finding in findings]}))
        raise typer.Exit(not healthy)
    for finding in findings:
        out.print(f"{STATUS_SYMBOLS[finding.status]} [bold]{finding.name:<8}[/bold] {escape(finding.found)}")
        if finding.do:
            out.print(f"           → {escape(finding.do)}")
    raise typer.Exit(not healthy)
