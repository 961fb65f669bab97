"""`imprint models`."""

import json
from dataclasses import asdict

from rich.table import Table

from service.cli.console import out
from service.cli.options import AsJson
from service.settings import Settings


def models(as_json: AsJson = False) -> None:
    """List bases with their sizes, licences and memories, and what they would cost here. Fetches nothing."""
    from research.bases import KNOWN_BASES, estimate, measure_machine, memory_here

    settings = Settings.load()
    machine = measure_machine(settings)
    rows = [
        (base, memory_here(base.name, settings), estimate(base.parameters, machine, settings)) for base in KNOWN_BASES
    ]
    if as_json:
        listed = [asdict(base) | {"memory": memory} | asdict(cost) for base, memory, cost in rows]
        print(json.dumps({"machine": asdict(machine), "models": listed}))
        return
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("name", "size", "memory", "GB", "prompt", "reply"):
        table.add_column(column, no_wrap=True)  # names are there to be copied
    table.add_column("licence", overflow="fold")
    for base, memory, cost in rows:
        table.add_row(
            base.name + ("" if base.real else " *"),
            f"{base.parameters / 1e9:.1f}B",
            memory,
            f"{cost.memory_bytes / 1e9:.1f}",
            f"{cost.prompt_seconds:.0f} s",
            f"{cost.token_seconds * 1000:.0f} ms",
            base.licence,
        )
    out.print(table)
    if settings.model not in {base.name for base in KNOWN_BASES}:
        out.print(f"IMPRINT_MODEL is {settings.model}; its memory: {memory_here(settings.model, settings)}")
    out.print("prompt: of 1,000 tokens; reply: a token of one")
    out.print(
        "memory: shipped; fitted by `imprint fit`; none: `imprint fit NAME` makes one; –: the base is not here yet"
    )
    out.print("* its family was tested on small random weights only (docs/bases.md)")
    out.print(
        f"GB and times are estimates for this CPU, from one matrix product ({machine.flops / 1e9:,.0f} GFLOP/s) and one"
        f" product with a vector ({machine.bytes_per_second / 1e9:,.1f} GB/s), both in fp32; `imprint bench` measures."
    )
