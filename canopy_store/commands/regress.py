"""`canopy regress`: semantic diversity explained by entropy rate, prompt, task and family held fixed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click
import duckdb

from canopy_store.commands.shared import (
    ALLOW,
    CLUSTERS,
    FORMAT,
    GRADER,
    RUNS,
    SEEDS,
    bar,
    echo,
    print_object,
    print_rows,
)
from canopy_store.errors import UsageError


@click.command("regress")
@click.option("--store", "root", metavar="DIR", envvar="CANOPY_STORE", help="The store's folder.")
@click.option("--panel", metavar="FILE", help="A panel as CSV or Parquet, instead of a store.")
@click.option("--model", required=True, type=click.Choice(["main", "interaction", "quadratic", "beta"]))
@click.option(
    "--outcome",
    default="D",
    show_default=True,
    metavar="COLUMN",
    help="Column to explain: D, vendi_score, accuracy, rse_norm, or another number of the panel.",
)
@click.option("--baseline", default="base", show_default=True, metavar="V")
@click.option("--reference-task", metavar="T", help="[default: completion, else the first by name]")
@click.option(
    "--drop",
    multiple=True,
    type=click.Choice(["task", "family"]),
    help="Leave this factor out; needed where it has one level.",
)
@click.option("--selection", metavar="NAME", help="[default: all]")
@click.option("--embedder", metavar="NAME", help="Needed where there are several.")
@GRADER
@RUNS
@ALLOW
@SEEDS
@click.option(
    "--checkpoints",
    type=click.Choice(["random", "fixed"]),
    default="random",
    show_default=True,
    help="Judge a variant also by how families, or training seeds, differ; fixed: by these alone.",
)
@click.option(
    "--precision",
    type=click.Choice(["full", "crossed", "variant"]),
    default="full",
    show_default=True,
    help="Terms of the beta model's log precision; crossed, with 1/N_bar by variant, for vendi_norm; "
    "variant alone with few prompts.",
)
@click.option(
    "--bootstrap",
    default=0,
    metavar="B",
    help="Beta model: also test eta = 0 by B panels drawn without it, as in 199.",
)
@click.option(
    "--sweep",
    "over",
    type=click.Choice(["embedder", "selection"]),
    help="Fit once for each, and show how much the ratio depends on it.",
)
@click.option(
    "--errors",
    type=click.Choice(["none", "moments", "split"]),
    help="How errors of R_bar, N_bar and D are taken out [default: moments; beta, quadratic: none].",
)
@click.option("--splits", default=20, show_default=True, help="Halvings of the rollouts, for split.")
@click.option(
    "--replicates", default=2000, show_default=True, help="Of the bootstrap of a corrected fit."
)
@click.option(
    "--seed", default=0, show_default=True, help="Of bootstraps, splits and simulated residuals."
)
@click.option(
    "--table",
    "shown",
    type=click.Choice(["coefficients", "slopes", "tests", "across", "reliability"]),
    help="What csv and parquet hold [default: coefficients]; table and json have all.",
)
@CLUSTERS
@FORMAT
def regress_command(
    root: str | None,
    panel: str | None,
    selection: str | None,
    embedder: str | None,
    runs: tuple[str, ...],
    over: str | None,
    shown: str | None,
    form: str,
    **options: Any,
) -> None:
    """Explain semantic diversity by entropy rate and length, with prompt, task and family held fixed.

    \b
    main         D ~ R_bar + N_bar + task + family*variant + (1|prompt)
    interaction  D ~ R_bar*variant + N_bar + task + family + (1|prompt)
    quadratic    interaction with and without R_bar squared, and their likelihood-ratio test
    beta         a beta mixed model with its dispersion model: how many times as strongly
                 entropy rate turns into diversity is the ratio (beta+eta)/beta

    R_bar, N_bar and D are means over the same rollouts. Their errors draw slopes towards 0 and can make
    a ratio of their own, so main and interaction take them out: moments by their known variances, split
    by halves of the rollouts as each other's instruments. Where too little is left it refuses, and says
    how many rollouts would do. beta takes them out where moments is asked for; quadratic cannot.

    \b
    Examples:
      canopy regress --model interaction --store S
      canopy regress --model interaction --store S --errors split
      canopy regress --model beta --panel panel.csv --errors moments
      canopy regress --model interaction --store S --drop family --format csv --table slopes
      canopy regress --model interaction --store S --drop family --seeds 'sft=sft-*'
      canopy regress --model beta --store S --bootstrap 199
      canopy regress --model interaction --store S --sweep embedder
    """
    from canopy_store.analysis.regression import ALONE, as_object, panel_file, read_panel, regress

    if (root is None) == (panel is None):
        raise UsageError("regress needs either --store DIR or --panel FILE")
    if shown is not None and form in ("table", "json"):
        raise UsageError(f"--table {shown}: goes with --format csv or parquet; {form} has every table")
    rows: dict[str, Any] = {"selection": selection, "embedder": embedder, "runs": runs}
    if over is not None:
        source = str(root) if panel is None else panel_file(panel)
        _print_sweep(source, over, form, **rows, **options)
        return
    with bar("bootstrap") as progress:
        if options["bootstrap"]:
            progress.start(options["bootstrap"], 0)
        options["advance"] = progress.rollouts
        if panel is not None:
            fit = regress(read_panel(panel, **rows), **options)
        else:
            fit = regress(str(root), **rows, **options)
    if panel is not None:
        named = tuple(w.replace("--panel FILE", f"--panel {panel}") for w in fit.warnings)
        fit = replace(fit, warnings=named)
    if form == "json":
        print_object(as_object(fit))
        return
    if form != "table":
        for warning in fit.warnings:
            echo(f"canopy: {warning}", err=True)
        rows_shown = getattr(fit, shown or "coefficients")
        if not rows_shown.columns:
            raise UsageError("--table reliability: the panel has no columns of errors")
        print_rows(duckdb.from_arrow(rows_shown.to_arrow()), form)
        return
    echo(f"{fit.model}: {fit.formula}")
    echo(f"errors of R_bar, N_bar and D: {_WAYS[fit.errors]}")
    for title, table in (
        ("", fit.coefficients),
        ("slopes of entropy rate, these checkpoints alone", fit.slopes),
        ("tests", fit.tests),
        ("over other families or training seeds", fit.across),
        ("reliability of R_bar", fit.reliability),
    ):
        if len(table):
            echo(title and f"\n{title}")
            print_rows(duckdb.from_arrow(table.to_arrow()), form)
        if table is fit.slopes:
            for warning in fit.warnings:
                echo(f"warning: {warning}")
    if fit.residuals:
        echo("\nsimulated quantile residuals, p: " + _pairs(fit.residuals))
    echo(_pairs(fit.fit))
    if fit.fit["holds_for"].startswith(ALONE):
        echo(f"{fit.fit['holds_for']}: nothing is said of another family or training seed")


def _print_sweep(panel: Any, over: str, form: str, **options: Any) -> None:
    from canopy_store.analysis.regression import spread, sweep

    rows = sweep(panel, over, **options)  # type: ignore[arg-type]
    warned = rows.drop_nulls("warnings").unique("value", maintain_order=True)
    shown = rows.drop("warnings", "refused") if form == "table" else rows
    print_rows(duckdb.from_arrow(shown.to_arrow()), form)
    for value, warning in warned.select("value", "warnings").iter_rows():
        if form == "table":
            echo(f"warning: {value}: {warning}")
        elif form != "json":
            echo(f"canopy: {value}: {warning}", err=True)
    if form != "table":
        return
    for value, reason in rows.drop_nulls("refused").select("value", "refused").iter_rows():
        echo(f"{value}: {reason}")
    for row in spread(rows).iter_rows(named=True):
        echo(
            f"ratio of {row['variant']}, fits by {over} {row['fits']}: {row['ratio_min']:.3g} to "
            f"{row['ratio_max']:.3g}, median {row['ratio_median']:.3g}"
        )


_WAYS = {
    "none": "not taken out",
    "moments": "taken out by their variances and covariances (moments)",
    "split": "taken out by halves of the rollouts (split)",
}


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
        if value not in (None, [], {})
    )
