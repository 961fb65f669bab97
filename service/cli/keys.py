"""`imprint keys`."""

from typing import Annotated

import typer

from service import tenants
from service.cli.console import err

keys_app = typer.Typer(no_args_is_help=True, help="Make API keys.")


@keys_app.command("new")
def new_key(
    tenant: Annotated[str, typer.Argument(help="The key's tenant; `metrics` for a key that opens /metrics alone.")],
) -> None:
    """Make a key: `imprint keys new acme >> FILE` shows it once and adds its hash to the server's file."""
    key, line = tenants.new_key(tenant)
    print(line)
    err.print(f"the key, shown this once: {key}")
