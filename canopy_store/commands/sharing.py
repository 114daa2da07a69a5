"""The commands that look after a store and share it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
import duckdb

from canopy_store import store
from canopy_store.commands.shared import FORMAT, RUNS, STORE, bar, echo, print_rows
from canopy_store.errors import DataError
from canopy_store.sharing import export, pull, push
from canopy_store.sharing.merge import merge
from canopy_store.terminal import printable
from canopy_store.upkeep.compact import compact
from canopy_store.upkeep.remove import (
    remove_corpus,
    remove_run,
    remove_task,
    require_run,
    require_stored,
)
from canopy_store.upkeep.upgrade import upgrade
from canopy_store.upkeep.verify import verify


@click.command("verify")
@STORE
@click.option("--deep", is_flag=True, help="Also recompute every spectrum from its embeddings.")
@FORMAT
@click.option("--json", "form", flag_value="json", help="The same as --format json.")
def verify_command(root: str, deep: bool, form: str) -> None:
    """Check every file of a store: schema, hashes, keys, lengths, bounds, sums, spectra.

    Prints a row for each problem and exits with 1 where one is more than a harmless leftover.

    \b
    Examples:
      canopy verify --store S
      canopy verify --store S --deep --json
    """
    problems = verify(root, deep)
    if len(problems) or form != "table":
        print_rows(duckdb.from_arrow(problems.to_arrow()), form)
    bad = problems.filter(~problems["harmless"])
    if len(bad):
        raise DataError(f"{root}: {len(bad)} problems, the first in {bad['file'][0]}: {bad['what'][0]}")
    if form == "table":
        echo(f"{root}: all is well" + (f", {len(problems)} leftovers" if len(problems) else ""))


@click.command("export")
@STORE
@click.option("--out", required=True, metavar="DIR", help="New folder.")
@click.option(
    "--tables",
    multiple=True,
    metavar="NAME[,NAME]...",
    help="Take only these tables along [default: all]; models, prompts, runs and rollouts always go.",
)
@click.option("--where", metavar="SQL", help="Only runs for which this is true: \"family = 'llama'\".")
@click.option(
    "--no-text",
    is_flag=True,
    help="Leave out texts and token ids; no measure is lost. --system and --examples stay.",
)
@click.option("--no-embeddings", is_flag=True, help="Leave out embeddings; their spectra stay.")
@click.option("--license", metavar="ID", help="Licence of the rollouts, as in cc-by-4.0.")
def export_command(
    root: str, tables: tuple[str, ...], no_text: bool, no_embeddings: bool, **options: Any
) -> None:
    """Write complete runs as a folder to share: a Hugging Face dataset, Croissant, and a store.

    \b
    Examples:
      canopy export --store S --out shared --license cc-by-4.0
      canopy export --store S --out math --where "task = 'math'" --no-text
      canopy export --store S --out small --tables embedding_spectra,rewards
    """
    named = [name.strip() for names in tables for name in names.split(",")]
    out = export(root, tables=named or None, text=not no_text, embeddings=not no_embeddings, **options)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    echo(f"{out}: {size:,} bytes, described in README.md and MANIFEST")


@click.command("pull")
@click.argument("source")
@STORE
def pull_command(source: str, root: str) -> None:
    """Merge an exported folder, or a dataset of the Hugging Face hub, into a store.

    All of SOURCE is checked before anything is written, nothing of it is executed; the same run twice
    is one run, and a run that is stored with other values is refused.

    \b
    Examples:
      canopy pull shared --store S
      canopy pull user/rollouts --store S
    """
    with bar("pulling") as progress:
        runs = pull(source, root, on_run=_counter(progress))
    echo(f"{root}: {len(runs)} runs from {source}: {', '.join(runs)}")


@click.command("push")
@click.argument("folder")
@click.argument("repo", metavar="USER/NAME")
@click.option("--dry-run", is_flag=True, help="Say what would be sent; send nothing.")
@click.option("--public", is_flag=True, help="A repository made now is open to all [default: private].")
def push_command(folder: str, repo: str, dry_run: bool, public: bool) -> None:
    """Send an exported FOLDER to the dataset USER/NAME of the Hugging Face hub.

    Log in first: hf auth login.

    \b
    Example:
      canopy push shared user/rollouts --dry-run
    """
    sent = push(folder, repo, dry_run=dry_run, private=not public)
    for name, size in sent if dry_run else ():
        echo(f"{size:>14,}  {name}")
    verb = "would send" if dry_run else "sent"
    echo(f"{verb} {len(sent)} files, {sum(s for _, s in sent):,} bytes, to {repo}")


@click.command("merge")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@STORE
def merge_command(sources: tuple[str, ...], root: str) -> None:
    """Take the complete runs of other stores, SOURCE, into a store.

    All of every SOURCE is checked before anything is written; the same run twice is one run, and a run
    that is stored with other values is refused.

    \b
    Example:
      canopy merge node1/S node2/S --store S
    """
    with bar("merging") as progress:
        runs = merge(sources, root, on_run=_counter(progress))
    echo(f"{root}: {len(runs)} runs from {len(sources)} stores: {', '.join(runs)}")


WITHOUT_LOCKS = click.option(
    "--without-locks",
    is_flag=True,
    help="Where no locks can be had, as on object storage: no other job uses these runs.",
)


@click.command("compact")
@STORE
@RUNS
@click.option("--corpus", "corpora", multiple=True, metavar="C", help="Only this corpus; repeatable.")
@click.option("--task", "tasks", multiple=True, metavar="T", help="Only these items; repeatable.")
@click.option(
    "--target-mb",
    default=128.0,
    show_default=True,
    metavar="MB",
    help="Size up to which shards are joined.",
)
@WITHOUT_LOCKS
def compact_command(root: str, **options: Any) -> None:
    """Make few shards of many small ones; no value, no order and no view changes.

    No other job may use the runs. Stopped at any moment, the same call finishes it.

    \b
    Examples:
      canopy compact --store S
      canopy compact --store S --run llama.base.math --target-mb 256
    """
    with bar("compacting") as progress:
        count = _counter(progress)
        done = compact(root, on_run=count, **options)
    for run_id, (before, after) in done.items():
        echo(f"{root}: {run_id}: {before} shards are now {after}")
    if not done:
        echo(f"{root}: nothing to do: no two neighbouring shards fit in {options['target_mb']:g} MB")


@click.command("rm-run")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@STORE
@click.option("--yes", is_flag=True, help="Do not ask.")
@WITHOUT_LOCKS
def remove_run_command(runs: tuple[str, ...], root: str, yes: bool, without_locks: bool) -> None:
    """Remove runs: their rollouts, all that was made of these, and their plans.

    Stopped half way, the run is incomplete and hidden; the same call finishes it.

    \b
    Example:
      canopy rm-run llama.base.math --store S --yes
    """
    for run_id in runs:
        require_run(store.require(root), run_id)
    if not yes:
        click.confirm(printable(f"Remove every file of {', '.join(runs)}?"), abort=True)
    for run_id in runs:
        count = remove_run(root, run_id, without_locks=without_locks)
        echo(f"{root}: {run_id} removed, {count} files")


@click.command("rm-corpus")
@click.argument("corpora", nargs=-1, required=True, metavar="CORPUS...")
@STORE
@click.option("--yes", is_flag=True, help="Do not ask.")
@WITHOUT_LOCKS
def remove_corpus_command(corpora: tuple[str, ...], root: str, yes: bool, without_locks: bool) -> None:
    """Remove corpora: their documents, and every scorer's scores of these.

    Stopped half way, the corpus is hidden; the same call finishes it.

    \b
    Example:
      canopy rm-corpus news --store S --yes
    """
    for corpus in corpora:
        require_stored(store.require(root), "corpus", corpus)
    if not yes:
        click.confirm(printable(f"Remove every file of {', '.join(corpora)}?"), abort=True)
    for corpus in corpora:
        count = remove_corpus(root, corpus, without_locks=without_locks)
        echo(f"{root}: {corpus} removed, {count} files")


@click.command("rm-task")
@click.argument("tasks", nargs=-1, required=True, metavar="TASK...")
@STORE
@click.option("--yes", is_flag=True, help="Do not ask.")
@WITHOUT_LOCKS
def remove_task_command(tasks: tuple[str, ...], root: str, yes: bool, without_locks: bool) -> None:
    """Remove the items of tasks, and every scorer's scores of their options; runs of a task stay.

    Stopped half way, the items are hidden; the same call finishes it.

    \b
    Example:
      canopy rm-task facts --store S --yes
    """
    for task in tasks:
        require_stored(store.require(root), "task", task)
    if not yes:
        click.confirm(printable(f"Remove every file of {', '.join(tasks)}?"), abort=True)
    for task in tasks:
        count = remove_task(root, task, without_locks=without_locks)
        echo(f"{root}: {task} removed, {count} files")


@click.command("upgrade")
@STORE
@WITHOUT_LOCKS
def upgrade_command(root: str, without_locks: bool) -> None:
    """Make a store of format 1 one of this version's format, in place; no value and no view changes.

    No other job may use the store. It shows what it showed until the last step; stopped at any moment,
    the same call finishes it.

    \b
    Example:
      canopy upgrade --store S
    """
    with bar("upgrading") as progress:
        count = upgrade(root, on_file=_counter(progress), say=progress.say, without_locks=without_locks)
    done = f"{count} files rewritten" if count else "nothing to do"
    echo(f"{root}: a store of format {store.FORMAT_VERSION}: {done}")


def _counter(progress: Any) -> Callable[[int, int], None]:
    """Shows on a bar how many runs are done; sources follow one another on it."""

    def on_run(done: int, every: int) -> None:
        progress.start(every, done)

    return on_run
