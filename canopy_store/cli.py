"""The command line: each command is a thin skin on one Python function."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click
import duckdb

import canopy_store
from canopy_store import sql, store
from canopy_store.commands import analysis as cli_analysis
from canopy_store.commands import ingest as cli_ingest
from canopy_store.commands import sharing as cli_sharing
from canopy_store.commands.augment import augment_command
from canopy_store.commands.completion import add_completions
from canopy_store.commands.demo import demo_command
from canopy_store.commands.grades import calibrate_command, passk_command
from canopy_store.commands.query import sql_command
from canopy_store.commands.regress import regress_command
from canopy_store.commands.shared import FORMAT, STORE, bar, echo, print_rows, require_ingest
from canopy_store.commands.study import study_group
from canopy_store.errors import CanopyError
from canopy_store.readers.importing import import_rollouts
from canopy_store.readers.importing_options import import_options
from canopy_store.readers.lm_eval import holds_options
from canopy_store.upkeep.status import (
    corpora,
    made_of_documents,
    made_of_items,
    made_of_runs,
    status,
    tasks,
)

# From here on small files cost a query more than what is in them.
MANY_SHARDS = 500


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
@STORE
def init(root: str) -> None:
    """Make a store, or rebuild the canopy.duckdb of one.

    canopy.duckdb holds views only: open it with any DuckDB shell from inside the store's folder.

    \b
    Example:
      canopy init --store S && cd S && duckdb canopy.duckdb "from model_metrics"
    """
    path = sql.write_database(store.init(root))
    echo(f"{root}: a store" + (f", with views in {path.name}" if path else ""))


@cli.command("import")
@click.argument("source", metavar="PATH")
@STORE
@click.option(
    "--format",
    metavar="NAME",
    help="parquet, paper, lm-eval, inspect, openai-batch [default: as found].",
)
@click.option("--family", metavar="F", help="Model family, where PATH does not tell it.")
@click.option("--variant", metavar="V", help="Variant, where PATH does not tell it.")
@click.option("--task", metavar="T", help="Task, where PATH does not tell it.")
@click.option("--temperature", type=float, help="Sampling temperature, where PATH does not tell it.")
@click.option(
    "--top-k",
    type=int,
    help="Likewise [default: 0, off, where the log's engine has no other].",
)
@click.option("--top-p", type=float, help="Likewise [default: 1, off].")
@click.option(
    "--processed-logprobs",
    is_flag=True,
    help="PATH's log-probabilities are those after temperature, top-k and top-p.",
)
@click.option(
    "--tokenizer",
    metavar="PATH_OR_ID",
    help="The model's tokenizer, for tokens and rollouts known as text alone.",
)
@click.option("--requests", metavar="FILE.jsonl", help="The input of the batch that PATH answers.")
@click.option(
    "--max-new-tokens",
    type=int,
    metavar="N",
    help="Marks rollouts of N tokens as cut, where finish_reason is absent.",
)
@click.option(
    "--run",
    metavar="NAME",
    help="Name of the run [default: family.variant.task]; of options, of their scorer.",
)
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
@click.option(
    "--grader",
    default="imported",
    show_default=True,
    metavar="NAME",
    help="Name for the columns correct, score and answer.",
)
def import_command(source: str, root: str, tokenizer: str | None, **options: Any) -> None:
    """Bring your own rollouts from the file or folder PATH.

    Parquet needs the columns family, variant, task, prompt_id, sample and one of entropy (a list of
    nats, one a token), logprob, token_ids and n_tokens. Other formats: the tree of the paper's own
    code, lm-evaluation-harness samples, Inspect logs or a folder of them, OpenAI and vLLM batch output. The
    store is
    made if it is missing; the same source twice is once.

    lm-evaluation-harness samples of a multiple-choice task become items and option_scores, as they
    stand: canopy sql "from option_accuracy" has the accuracy of the log.

    \b
    Examples:
      canopy import rollouts.parquet --store S --max-new-tokens 256
      canopy import outputs/ --store S
      canopy import log.eval --store S --family llama --variant sft
      canopy import samples_arc_easy_2026-11-21T11-14-57.020158.jsonl --store S \\
          --family llama --variant sft
      canopy import batch_output.jsonl --requests batch_input.jsonl --store S \\
          --family gpt --variant base --task trivia --temperature 1
    """
    if options["format"] in (None, "lm-eval") and holds_options(Path(source)):
        named = {key: options[key] for key in ("family", "variant", "task")}
        said: list[str] = []
        scorer = import_options(root, source, name=options["run"], say=said.append, **named)
        echo(f"{root}: items and their options, scored by {scorer}")
        for line in said:
            echo(line)
        return
    loaded = None
    if tokenizer:
        require_ingest()
        from canopy_store.ingest.tokenizer import load_tokenizer

        loaded = load_tokenizer(tokenizer)
    with bar("importing") as progress:
        done = 0

        def on_shard(now: int, every: int) -> None:
            nonlocal done
            if not done:
                progress.start(every, 0)
            progress.rollouts(now - done)
            done = now

        runs = import_rollouts(
            root, source, tokenizer=loaded, on_shard=on_shard, say=progress.say, **options
        )
    echo(f"{root}: {done} rollouts in {len(runs)} runs: {', '.join(runs)}")


@cli.command("status")
@STORE
@FORMAT
def status_command(root: str, form: str) -> None:
    """Show runs, rollouts, tokens, bytes, what was made of the runs, and what is incomplete.

    \b
    Example:
      canopy status --store S
    """
    frame = status(root)
    print_rows(duckdb.from_arrow(frame.to_arrow()), form)
    if form == "table":
        total = frame.select("rollouts", "tokens", "bytes").sum().row(0)
        there = store.require(root)
        entries = {name: said for each in store.records(there) for name, said in each.files.items()}
        size = sum(said["bytes"] or 0 for said in entries.values())
        echo(f"{len(frame)} runs, {total[0]:,} rollouts, {total[1]:,} tokens, {size:,} bytes")
        shards = sum(name.startswith("rollouts/") for name in entries)
        if shards >= MANY_SHARDS and total[2] < shards << 20 and not store.remote(there):
            echo(
                f"{shards:,} shards of less than a MiB: queries are quicker once they are few: "
                f"canopy compact --store {root}"
            )
        for kind, rows in made_of_runs(there).group_by("kind", maintain_order=True):
            names = (f"{name} ({runs} of {complete} runs)" for _, name, runs, complete in rows.rows())
            echo(f"{str(kind[0]).replace('_', ' ')}s: {', '.join(names)}")
        for corpus, documents, held in corpora(there).rows():
            echo(f"corpus {corpus}: {documents:,} documents, {held:,} bytes with their scores")
        for _, name, done, every in made_of_documents(there).rows():
            echo(f"document scorer {name}: {done} of {every} corpora")
        for task, items, held in tasks(there).rows():
            echo(f"task {task}: {items:,} items, {held:,} bytes with their scores")
        for _, name, done, every in made_of_items(there).rows():
            echo(f"option scorer {name}: {done} of {every} tasks of items")
        for row in frame.filter(~frame["complete"]).iter_rows(named=True):
            planned = row["shards_planned"] or "?"
            echo(
                f"incomplete: {row['run_id']}: {row['shards']} of {planned} shards; "
                "run its ingest again with the same settings to finish it"
            )
        for run_id in frame.filter(frame["complete"] & ~frame["entropies"])["run_id"]:
            echo(
                f"no entropies: {run_id}: its engine gave none; complete them with the run's own model: "
                f"canopy ingest score --store {root} --run {run_id} --scorer MODEL"
            )


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for SHELL.

    It completes commands, options, metrics and files; and where --store stands before them in the line,
    or CANOPY_STORE is set, the runs, variants, tasks, selections and embedders of that store.

    \b
    Example:
      eval "$(canopy completion bash)"
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None  # click.Choice lists only shells that click knows
    click.echo(found(cli, {}, "canopy", "_CANOPY_COMPLETE").source())


for command in (
    demo_command,
    sql_command,
    cli_analysis.select,
    cli_analysis.compare_command,
    cli_analysis.power_command,
    passk_command,
    calibrate_command,
    regress_command,
    cli_analysis.report_command,
    cli_ingest.ingest,
    study_group,
    cli_sharing.verify_command,
    cli_sharing.export_command,
    cli_sharing.pull_command,
    cli_sharing.push_command,
    cli_sharing.merge_command,
    cli_sharing.compact_command,
    cli_sharing.remove_run_command,
    cli_sharing.remove_corpus_command,
    cli_sharing.remove_task_command,
    cli_sharing.upgrade_command,
):
    cli.add_command(command)
cli_ingest.ingest.add_command(augment_command)
add_completions(cli)


def main(arguments: list[str] | None = None) -> int:
    """The exit code of one call: 0, 1 for data that fails, 2 for a wrong call, 130 for Ctrl-C."""
    try:
        cli.main(arguments, prog_name="canopy", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        echo(error.format_message())
        return 0
    except click.ClickException as error:
        hint = getattr(error, "ctx", None)
        where = f"; see: {hint.command_path} --help" if hint else ""
        message = " ".join(error.format_message().split()).rstrip(".")
        echo(f"canopy: {message}{where}", err=True)
        return 2
    except CanopyError as error:
        echo(f"canopy: {' '.join(str(error).split())}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        echo(
            "canopy: interrupted; what was stored is whole: run the same command again to resume",
            err=True,
        )
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a disk that fails while it is read: writing has its own line
        reason = error.strerror or str(error)
        echo(f"canopy: {error.filename or 'the disk'}: cannot be read: {reason}; try it again", err=True)
        return 1
    return 0


def script() -> None:
    """The console script ``canopy``."""
    sys.exit(main())


if __name__ == "__main__":
    script()
