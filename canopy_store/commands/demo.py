"""The command ``canopy demo``: the example store, and what to do with one."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import click

from canopy_store import sql
from canopy_store.commands.shared import echo, print_rows
from canopy_store.errors import UsageError
from canopy_store.sharing.example import unpack_example

_METRICS = (
    "select task, variant, n_rollouts, ce_star, entropy_rate, mean_length, vendi_score "
    "from model_metrics order by task, variant"
)


@click.command("demo")
@click.option("--out", default="canopy-demo", show_default=True, metavar="DIR", help="New folder.")
def demo_command(out: str) -> None:
    """Open an example store and write a report on it; needs no model, no torch and no network.

    The store holds rollouts of SmolLM2-135M-Instruct, its weights de-quantised from 4 bits, and of a
    fine-tuned child of it, on two tasks; they are cut at 80 tokens, which cuts most of the base's.

    \b
    Example:
      canopy demo
      canopy sql "from model_metrics" --store canopy-demo/store
    """
    from canopy_store.report import write_report

    started = time.perf_counter()
    folder = Path(out)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "store" / "canopy.json").exists():
        raise UsageError(f"--out {out}: exists and is not empty; choose a new folder")
    inside = next((at for at in folder.resolve().parents if (at / "canopy.json").exists()), None)
    if inside:
        raise UsageError(f"--out {out}: inside the store {inside}; choose a folder outside of it")
    root = unpack_example(folder / "store")
    echo(f"{root}: the example store: SmolLM2-135M-Instruct, and a fine-tuned child of it")
    with sql.connect(root) as con:
        print_rows(con.sql(_METRICS), "table")
    echo("writing the report, which takes some seconds")
    report = write_report(root, folder / "report.html")
    echo(f"{report}: open it in a browser ({time.perf_counter() - started:.0f} s in all)")
    place = shlex.quote(str(root))
    echo("\nWhat to try next:")
    echo(f'  canopy sql "select task, variant, text from rollouts limit 5" --store {place}')
    echo(f"  canopy compare --store {place} --metric ce_star --metric entropy_rate")
    echo(f"  canopy report --store {place} --out another.html --figures figures")
