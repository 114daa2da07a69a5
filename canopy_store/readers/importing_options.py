"""Bring your own option scores: a multiple-choice log becomes items and the scores of their options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from canopy_store import sql, store
from canopy_store.errors import ConflictError, DataError, StoreError, UsageError, differences
from canopy_store.readers.lm_eval import Choice, holds_options, read_options, task_of
from canopy_store.store.items import store_items
from canopy_store.store.scorers import add_scorer

# What the harness calls each way to choose, and the column of item_metrics that is it.
_LOGGED = {"acc": "correct_sum", "acc_norm": "correct_char", "acc_mutual_info": "correct_pmi"}


def import_options(
    root: str | Path,
    source: str | Path,
    *,
    family: str | None = None,
    variant: str | None = None,
    task: str | None = None,
    name: str | None = None,
    say: Callable[[str], None] | None = None,
) -> str:
    """The scorer_id under which a multiple-choice log is now stored; the same again changes nothing.

    Its documents become items and their log-probabilities option_scores, as they stand: how many tokens
    an option had, and what each got, is not in the log.

    Parameters
    ----------
    root : path of the store, made if missing
    source : samples_TASK_DATE.jsonl of lm-evaluation-harness, ``--log_samples``
    family, variant : of the model that was evaluated
    task : name of the items; by default as the file's name has it
    name : the scorer_id; by default family.variant
    say : called with a line on accuracies here and in the log

    Raises
    ------
    DataError
        A line that is no such sample; names file and line.
    UsageError
        A name that neither the source nor the caller tells.
    ConflictError
        The task is stored with other items, or scored by this scorer from another source.
    """
    path = Path(source)
    names = {"family": family, "variant": variant, "task": task or task_of(path)}
    for key, value in names.items():
        if value is None:
            raise UsageError(f"{path}: does not tell the {key}; give it with --{key}")
        store.check_name(f"--{key}", value)
    scorer_id = store.check_name("--run", name or f"{names['family']}.{names['variant']}")
    if not path.exists():
        raise StoreError(f"{path}: no such file")
    if not holds_options(path):
        raise DataError(f"{path}: not a log of given answers; rollouts come in with import_rollouts")
    choices = _unique(list(read_options(path)), path)
    settings = {"scorer_id": scorer_id, "engine": "import", "source_sha256": store.sha256(path)}
    root = store.init(root)
    keys = {"scorer_id": scorer_id, "task": str(names["task"])}
    with store.holding(root, keys["task"], key="task"):
        items = store_items(root, keys["task"], [choice.item for choice in choices])
        stored = store.record(root, "option_scores", **keys)
        if stored is not None and dict(stored.settings) != settings:
            raise ConflictError(
                f"task {keys['task']} is scored by {scorer_id} from another source: "
                f"{differences(stored.settings, settings)}; give the scorer another name with --run"
            )
        if stored is None:
            model = {key: names[key] for key in ("family", "variant")}
            model_id = store.add_model(root, model)
            add_scorer(root, {"scorer_id": scorer_id, "model_id": model_id, **model})
            _write(root, keys, items, choices, settings)
    sql.write_database(root)
    if say:
        for line in _compared(root, keys, choices):
            say(line)
    return scorer_id


def _unique(choices: list[Choice], path: Path) -> list[Choice]:
    seen: set[str] = set()
    for choice in choices:
        item_id = choice.item[0]["item_id"]
        if item_id in seen:
            raise DataError(f"{path}: doc_id {item_id} is there twice; take one of them out")
        seen.add(item_id)
    return choices


def _write(
    root: Path,
    keys: dict[str, str],
    items: store.Record,
    choices: list[Choice],
    settings: dict[str, Any],
) -> None:
    """Stores and commits the scores, a shard for each of the items."""
    scores = {choice.item[0]["item_id"]: choice for choice in choices}
    where = store.folder(root, "option_scores", **keys)
    paths = []
    for name in items.of("items"):
        part = store.read_rows(root / name, ["item_id", "option"]).to_pydict()
        rows = list(zip(part["item_id"], part["option"], strict=True))
        neutral = [
            None if (given := scores[item_id].neutral_sums) is None else given[option]
            for item_id, option in rows
        ]
        sums = [scores[item_id].sums[option] for item_id, option in rows]
        paths.append(store.shard_path(where, store.shard_number(Path(name))))
        columns = {**part, "logprob_sum": sums, "neutral_sum": neutral}
        store.write_rows(paths[-1], "option_scores", columns)
    store.commit(root, "option_scores", keys, paths, settings)


def _compared(root: Path, keys: dict[str, str], choices: list[Choice]) -> list[str]:
    """A line for each accuracy that the log has: the same from what is stored, beside it."""
    with sql.connect(root, relations=("item_metrics",)) as con:
        rows = con.sql(
            f"select {', '.join(f'avg({column})' for column in _LOGGED.values())} from item_metrics "
            "where scorer_id = $scorer_id and task = $task",
            params=keys,
        ).fetchall()
    lines = []
    for (name, column), value in zip(_LOGGED.items(), rows[0], strict=True):
        logged = [choice.logged[name] for choice in choices if name in choice.logged]
        if len(logged) == len(choices) and value is not None:
            mean = sum(logged) / len(logged)
            same = "" if abs(mean - value) < 1e-9 else ": options alike, or lengths counted otherwise"
            lines.append(f"{name} {mean:.4f} in the log, {column} {value:.4f} here{same}")
    return lines
