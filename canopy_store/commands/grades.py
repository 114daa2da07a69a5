"""The commands over grades: what k rollouts reach, and whether uncertainty tells what is wrong."""

from __future__ import annotations

from typing import Any

import click
import duckdb

from canopy_store.analysis.comparison import SEED
from canopy_store.commands.shared import ALLOW, FORMAT, GRADER, RUNS, SEEDS, STORE, echo, print_rows

_ONLY = (
    click.option("--family", "families", multiple=True, metavar="F", help="Only this one; repeatable."),
    click.option("--task", "tasks", multiple=True, metavar="T", help="Only this one; repeatable."),
    click.option("--variant", "variants", multiple=True, metavar="V", help="Only this; repeatable."),
)
# what csv, json and parquet have of a curve besides
_DETAILS = ("_se", "baseline_ci", "treated_ci", "n_left_out", "overtaken_at")


def _only(command: Any) -> Any:
    for option in reversed(_ONLY):
        command = option(command)
    return command


@click.command("passk")
@STORE
@click.option("--baseline", default="base", show_default=True, metavar="V")
@click.option(
    "--measure",
    type=click.Choice(["pass_at", "pass_hat", "maj_at"]),
    default="pass_at",
    show_default=True,
    help="One of k is right; all are; their commonest answer is.",
)
@click.option("--selection", default="all", show_default=True, metavar="NAME")
@GRADER
@RUNS
@ALLOW
@_only
@SEEDS
@click.option(
    "--by",
    type=click.Choice(["task", "family", "all"]),
    help="Only this level of pooling [default: all three].",
)
@click.option("--replicates", default=2000, show_default=True)
@click.option("--confidence", default=0.95, show_default=True)
@click.option("--seed", default=SEED, show_default=True)
@FORMAT
def passk_command(root: str, measure: str, form: str, **options: Any) -> None:
    """What k rollouts reach, for k = 1, 2, 4, …: each variant against its baseline, prompt by prompt.

    A fine-tuned model that is right more often at k = 1 may solve fewer prompts at all: the first lines
    say at which k the baseline overtakes it, if it does. Intervals are those of canopy compare.

    \b
    Examples:
      canopy passk --store S
      canopy passk --store S --grader number --measure maj_at --format csv > majority.csv
      canopy sql "from model_pass_at_k" --store S
    """
    from canopy_store.analysis.pass_at_k import PLACE, crossing, pass_at_k_curve

    frame = pass_at_k_curve(root, measure=measure, **options)
    if form == "table":
        for _, rows in frame.group_by(PLACE, maintain_order=True):
            echo(crossing(rows, measure))
        frame = frame.select(
            c for c in frame.columns if not any(part in c for part in _DETAILS) and frame[c].count()
        )
    print_rows(duckdb.from_arrow(frame.to_arrow()), form)


@click.command("calibrate")
@STORE
@click.option(
    "--column",
    required=True,
    metavar="NAME",
    help="Of a rollout: surprisal_rate, entropy_sum, …; of a prompt: ce_star, prompt.entropy_rate, ….",
)
@click.option(
    "--map",
    type=click.Choice(["complement", "exp", "identity"]),
    help="How it becomes a confidence: 1 - u, exp(-u), or is one [default: complement, of a share].",
)
@click.option("--bins", default=10, show_default=True, help="Of ECE, of equal width.")
@click.option("--selection", default="all", show_default=True, metavar="NAME")
@click.option("--embedder", metavar="NAME", help="Needed where the store has several.")
@GRADER
@RUNS
@_only
@click.option("--replicates", default=1000, show_default=True)
@click.option("--confidence", default=0.95, show_default=True)
@click.option("--seed", default=SEED, show_default=True)
@click.option(
    "--table",
    "shown",
    type=click.Choice(["runs", "bins"]),
    default="runs",
    show_default=True,
    help="A row a run, or the bins of each.",
)
@FORMAT
def calibrate_command(root: str, shown: str, form: str, **options: Any) -> None:
    """Whether an uncertainty tells right rollouts from wrong ones.

    \b
    auroc  chance that a wrong rollout is less certain than a right one: 0.5 tells nothing
    brier  mean squared error of the confidence that the column claims, by --map
    ece    how far claims are from the share that is right, over bins of the claim
    prr    what rejecting the least certain gains: 0 as by lot, 1 as by an oracle

    \b
    Examples:
      canopy calibrate --store S --column ce_star
      canopy calibrate --store S --column surprisal_rate --map exp --grader number
      canopy calibrate --store S --column surprisal_rate --map exp --table bins
    """
    from canopy_store.analysis.uncertainty import calibrate, reliability_bins

    if shown == "bins":
        for name in ("replicates", "confidence", "seed"):
            options.pop(name)
        frame = reliability_bins(root, **options)
    else:
        frame = calibrate(root, **options)
    if form == "table":
        for row in frame.to_dicts() if "reason" in frame.columns else []:
            if row["reason"]:
                echo(f"{row['run_id']}: {row['reason']}")
        frame = frame.select(c for c in frame.columns if c != "reason" and frame[c].count())
    print_rows(duckdb.from_arrow(frame.to_arrow()), form)
