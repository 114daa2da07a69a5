"""The commands that select, compare, regress and report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
import duckdb

from canopy_store.analysis.bootstrap import MEASURES
from canopy_store.analysis.comparison import SEED, compare
from canopy_store.analysis.power import SAMPLES, power, power_of_regression
from canopy_store.analysis.selections import select_lengths, select_reward
from canopy_store.commands.compared import show_comparison, show_prompts
from canopy_store.commands.shared import (
    ALLOW,
    CLUSTERS,
    FORMAT,
    GRADER,
    RUNS,
    SEEDS,
    STORE,
    echo,
    print_rows,
)
from canopy_store.errors import UsageError


@click.group()
def select() -> None:
    """Name a subset of the rollouts; every view carries it beside 'all', in the column selection."""


@select.command("reward")
@STORE
@click.option("--keep", required=True, type=float, help="Share of a prompt's rollouts: 0.7 keeps 70%.")
@click.option("--reward-model", metavar="NAME", help="Needed where the store has several.")
@click.option("--name", metavar="NAME", help="Name of the selection [default: reward_top_70 for 0.7].")
def select_reward_command(root: str, keep: float, **options: Any) -> None:
    """Keep each prompt's best rollouts: the ceil(keep * M) highest rewards.

    \b
    Example:
      canopy select reward --store S --keep 0.7
      canopy sql "select selection, variant, ce_star from model_metrics" --store S
    """
    echo(f"{root}: selection {select_reward(root, keep, **options)}")


@select.command("lengths")
@STORE
@click.option("--baseline", default="base", show_default=True, metavar="V")
@click.option(
    "--caliper", default=0.1, show_default=True, help="A pair's lengths differ by at most this share."
)
@RUNS
@click.option("--name", metavar="NAME", help="[default: lengths_matched_VARIANT, one a variant]")
def select_lengths_command(root: str, **options: Any) -> None:
    """Pair rollouts of two variants by length, within each prompt; what has no partner is left out.

    A comparison on the selection conditions on length, an outcome that a treatment changes too: what it
    finds is no effect of the treatment by itself.

    \b
    Example:
      canopy select lengths --store S --baseline base
      canopy compare --store S --selection lengths_matched_sft
    """
    for name in select_lengths(root, **options):
        echo(f"{root}: selection {name}")


_COMPARED = (
    click.option(
        "--baseline",
        default="base",
        show_default=True,
        metavar="V",
        help="Variant the others are compared with, within their family.",
    ),
    click.option("--selection", default="all", show_default=True, metavar="NAME"),
    click.option("--embedder", metavar="NAME", help="Needed where the store has several."),
    GRADER,
    RUNS,
    ALLOW,
)


def _comparison_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_COMPARED):
        command = option(command)
    return command


@click.command("compare")
@STORE
@_comparison_options
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="NAME",
    help="Column of model_metrics, accuracy, pass_at_8, …, or a measure of items or documents; "
    "repeatable [default: the main ones].",
)
@click.option(
    "--unit",
    type=click.Choice(["prompt", "item", "document"]),
    help="What is compared: rollouts of prompts, scored items or documents [default: the metrics'].",
)
@click.option(
    "--by",
    type=click.Choice(["task", "family", "all", "prompt"]),
    help="Only this level of pooling [default: the first three]; prompt ranks the changes of prompts.",
)
@click.option("--family", "families", multiple=True, metavar="F", help="Only this one; repeatable.")
@click.option("--task", "tasks", multiple=True, metavar="T", help="Only this one; repeatable.")
@click.option(
    "--split", "splits", multiple=True, metavar="S", help="Only this part of items or documents."
)
@click.option(
    "--variant", "variants", multiple=True, metavar="V", help="Only this and the baseline; repeatable."
)
@SEEDS
@click.option(
    "--horizon",
    type=int,
    metavar="T",
    help="Every measure of the first T tokens, for runs with other caps or much that was cut.",
)
@click.option(
    "--resample",
    type=click.Choice(["prompts", "both", "rollouts"]),
    default="prompts",
    show_default=True,
    help="What the bootstrap draws.",
)
@click.option("--replicates", default=2000, show_default=True)
@click.option("--confidence", default=0.95, show_default=True)
@click.option(
    "--interval",
    type=click.Choice(["t", "percentile"]),
    default="t",
    show_default=True,
    help="Student's t, as p has it, or percentiles of the bootstrap.",
)
@click.option(
    "--margin",
    "margins",
    multiple=True,
    metavar="NAME=SIZE",
    help="Test equivalence: |delta| below SIZE, in the metric's unit or as 5%.",
)
@click.option("--seed", default=SEED, show_default=True)
@CLUSTERS
@FORMAT
def compare_command(root: str, margins: tuple[str, ...], form: str, **options: Any) -> None:
    """Compare each variant with the baseline of its family, prompt by prompt.

    Deltas with intervals from the paired bootstrap over prompts (of scored items and documents over
    their clusters, each scorer an arm), and p-values adjusted over all that is shown. What was not
    sampled or read alike is refused until --allow names what differs. The table has the main columns,
    csv, json and parquet have all.

    \b
    Examples:
      canopy compare --store S
      canopy compare --store S --metric rho_pearson --by task --format csv > rho.csv
      canopy compare --store S --selection reward_top_70 --margin entropy_rate=5%
      canopy compare --store S --horizon 64
      canopy compare --store S --allow rendering --by prompt --metric ce_star
      canopy compare --store S --seeds 'sft=sft-*'
      canopy compare --store S --metric accuracy --metric pass_at_8 --grader number
      canopy compare --store S --unit item --split reversal
      canopy compare --store S --metric nll --task licences
    """
    sizes = {}
    for text in margins:
        name, equals, size = text.partition("=")
        if not equals:
            raise UsageError(f"--margin {text}: needs NAME=SIZE, as in ce_star=5%")
        sizes[name] = size
    frame = compare(root, margins=sizes, **options)
    if form != "table":
        print_rows(duckdb.from_arrow(frame.to_arrow()), form)
    elif options["by"] == "prompt":
        show_prompts(frame)
    else:
        show_comparison(frame)


@click.command("power")
@STORE
@_comparison_options
@click.option("--metric", metavar="NAME", help="ce_star, rho_pearson, …; accuracy_sum, nll, …")
@click.option("--delta", type=float, help="Change to detect, in the metric's unit.")
@click.option("--prompts", type=int, metavar="P", help="Instead: what change P prompts detect.")
@click.option(
    "--reliability",
    type=float,
    metavar="R",
    help="Instead: the samples with which a regression's entropy rates are so reliable, as 0.8.",
)
@click.option(
    "--samples",
    multiple=True,
    type=int,
    metavar="M",
    default=SAMPLES,
    help="Rollouts per prompt; repeatable [default: 4 to 128].",
)
@click.option("--power", default=0.8, show_default=True, help="Chance to detect it.")
@click.option("--alpha", default=0.05, show_default=True, help="Two-sided level.")
@click.option(
    "--cost-prompt",
    type=float,
    metavar="COST",
    help="Of a prompt, in any unit; adds the best M [default: only rollouts cost].",
)
@click.option(
    "--cost-rollout",
    type=float,
    default=1.0,
    show_default=True,
    metavar="COST",
    help="Of one more rollout of a prompt, both variants' together.",
)
@CLUSTERS
@FORMAT
def power_command(
    root: str, form: str, metric: str | None, reliability: float | None, **options: Any
) -> None:
    """How many prompts and samples a study needs, taking the store as pilot.

    \b
    n_prompts        by the pilot's best estimate of the variance: half of such plans fall short
    n_prompts_upper  by its upper 80% limit: four plans of five reach the power asked for
    power_if_upper   what n_prompts reach where the variance is at that limit

    \b
    Examples:
      canopy power --store S --metric rho_pearson --delta 0.1
      canopy power --store S --metric ce_star --delta 1 --cost-prompt 60 --cost-rollout 2
      canopy power --store S --metric ce_star --prompts 40
      canopy power --store S --metric accuracy_sum --delta 0.1
      canopy power --store S --reliability 0.8
    """
    if reliability is not None:
        of = {key: options[key] for key in ("selection", "embedder", "runs")}
        frame = power_of_regression(root, reliability, **of)
    elif metric is None:
        raise UsageError("--metric: missing; give the metric and --delta, or --reliability")
    else:
        frame = power(root, metric=metric, **options)
    if form == "table":
        if "cheapest" in frame.columns:
            for row in frame.filter("cheapest").iter_rows(named=True):
                echo(_in_words(row))
        frame = frame.select(name for name in frame.columns if name not in _POWER_DETAILS)
    print_rows(duckdb.from_arrow(frame.to_arrow()), form)


def _in_words(row: dict[str, Any]) -> str:
    """The cheapest plan of a variant."""
    unit = MEASURES[row["metric"]].unit
    whole, part = ("prompts", "samples") if unit == "prompt" else ("clusters", f"{unit}s")
    return (
        f"{row['variant']}: {row['n_prompts']} {whole} of {row['n_samples']} {part} detect a change of "
        f"{row['delta']:g} in {row['metric']} with power {row['power']:.2f}, if the pilot's "
        f"{row['pilot_prompts']} {whole} are right; {row['n_prompts_upper']} {whole} to be safer"
    )


# what csv, json and parquet have of a plan besides
_POWER_DETAILS = ("metric", "delta", "n_rollouts_upper", "cost_upper", "pilot_prompts", "pilot_samples")


@click.command("report")
@STORE
@click.option("--out", default="report.html", show_default=True, metavar="FILE", help="The page.")
@click.option("--figures", metavar="DIR", help="Also write every chart as PDF and SVG files here.")
@_comparison_options
@SEEDS
@click.option(
    "--explorer-rollouts",
    default=400,
    show_default=True,
    metavar="N",
    help="Rollouts the page carries, to be read one by one.",
)
@click.option(
    "--seed",
    default=SEED,
    show_default=True,
    help="Of the bootstrap, and of which rollouts and points are shown.",
)
def report_command(
    root: str, out: str, figures: str | None, explorer_rollouts: int, **options: Any
) -> None:
    """Write a report: one self-contained HTML page that needs no network.

    Its changes and intervals are those of canopy compare with the same options; checkpoints of one
    variant (--seeds) are pooled where items, documents and training are shown.

    \b
    Examples:
      canopy report --store S --out report.html
      canopy report --store S --seeds 'sft=sft-*'
      canopy report --store S --figures figures
    """
    from canopy_store.report import write_figures, write_report

    echo(write_report(root, out, explorer_rollouts=explorer_rollouts, **options))
    if figures:
        echo(f"{figures}: {len(write_figures(root, figures, **options))} files")
