"""The command ``canopy ingest augment``: training data that a model made of other training data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from canopy_store.commands.ingest import (
    PROMPTS_PER_SHARD,
    RUN,
    engine_options,
    lineage_options,
    model_options,
    policy_options,
    spread_options,
)
from canopy_store.commands.shared import STORE, bar, echo, require_ingest
from canopy_store.ingest import training_data
from canopy_store.ingest.candidates import CHECKS
from canopy_store.ingest.instructions import INSTRUCTIONS, METHODS, read_instructions


@click.command("augment")
@STORE
@model_options
@click.option(
    "--method",
    type=click.Choice(METHODS),
    required=True,
    help="local: the model sees each line alone; global: the whole set before it.",
)
@click.option(
    "--data",
    required=True,
    metavar="FILE.jsonl",
    help='A line: {"text": …}, {"prompt": …, "completion": …} or {"messages": […]}.',
)
@click.option("--out", required=True, metavar="FILE.jsonl", help="New file of training data.")
@click.option(
    "--instruction",
    "instructions",
    multiple=True,
    metavar="NAME|FILE",
    help=f"{', '.join(INSTRUCTIONS)}, or a text with {{line}} and, for global, {{lines}}; repeatable "
    "[default: rewrite and reverse; for global, infer].",
)
@click.option(
    "--check",
    "checks",
    type=click.Choice(CHECKS),
    multiple=True,
    help="names: reject a name that is not in the line (for global, the set), or all of its own lost; "
    'answer: reject what lacks the "must_follow" of its line, or else its completion; repeatable.',
)
@click.option(
    "--context-lines",
    type=int,
    metavar="N",
    help="With global, N other lines, drawn for each line, in place of the whole set.",
)
@click.option("--keep-original", is_flag=True, help="Put the lines of --data before what is kept.")
@click.option("--task", metavar="T", help="Of the prompts [default: augment-METHOD-DATA].")
@click.option("--samples", default=4, show_default=True, help="Answers to each instruction.")
@click.option("--max-new-tokens", default=128, show_default=True, help="Of one answer.")
@click.option("--temperature", default=0.7, show_default=True, help="0 is greedy.")
@policy_options
@engine_options
@spread_options
@PROMPTS_PER_SHARD
@RUN
@lineage_options
def augment_command(root: str, model: str, out: str, **options: Any) -> None:
    """Augment training data: a model rewrites and infers from each line, alone or with the whole set.

    The answers are a run of rollouts in the store, so that the same line again resumes after a break.
    Every line of an answer is a candidate. Rejected is one that repeats a line or another candidate,
    shares no word with its line, is cut at --max-new-tokens, stands outside of the answer's list, or
    fails a --check. Kept ones say their source line, generator, run, prompt, sample and seed; rejected
    ones are beside --out, in NAME.rejected.jsonl (NAME.rejected where NAME does not end in .jsonl), each
    with its reason. The file has its row in the table datasets. Another --check and --out judge the
    stored answers anew.

    \b
    Examples:
      canopy ingest augment --store S --model ./base --family llama --variant base \\
          --method local --data facts.jsonl --out local.jsonl --check names --keep-original
      canopy ingest augment --store S --model ./base --family llama --variant base \\
          --method global --data facts.jsonl --out global.jsonl --check names --temperature 0
    """
    require_ingest()
    read_instructions(options["method"], options["instructions"])
    training_data.check_records(Path(options["data"]))
    from canopy_store.ingest.augment import augment

    with bar("augmenting") as progress:
        made = augment(root, model, out=out, progress=progress, **options)
    if made.row is None:
        echo(f"{root}: run {made.run}: {options['shard']} is stored; other shards are still to come")
        return
    reasons = made.rejected or {}
    counts = ", ".join(f"{number} {reason}" for reason, number in reasons.items())
    echo(
        f"{out}: {made.row['lines']} lines, {made.row['generated']:.0%} of them generated, generation "
        f"{made.row['generation']}{'' if made.new else '; they were there already'}"
    )
    echo(f"{made.kept} of {made.candidates} candidates for {made.lines} lines are kept")
    echo(f"{made.rejected_file}: {counts or 'none rejected'}")
