"""Stores for the tests, ways to damage them and ways to look at all that they hold."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl

import canopy_store
from canopy_store import sql, store
from canopy_store.schema import TABLES, arrow_schema
from canopy_store.store.embeddings import write_embeddings
from canopy_store.store.scorers import add_scorer

GOLDEN = Path(__file__).parent / "data" / "golden"  # rollouts and what the paper's code gives of them
GOLDEN_ROLLOUTS = GOLDEN / "rollouts.parquet"
EXPECTED = json.loads((GOLDEN / "metrics_expected.json").read_text())
RUN = "chain.base.walk"  # the run that ingest_arguments() names
# what is of documents, items and trainings, and so empty in a store of rollouts alone
OF_TEXTS = {
    *("scorers", "documents", "document_scores", "items", "option_scores", "training", "datasets"),
    *("document_metrics", "perplexity", "forgetting", "paired_documents", "token_type_contributions"),
    *("number_formats", "item_metrics", "option_accuracy", "gain_forgetting", "collapse"),
}
# what is of pairs of rollouts that were judged
OF_MEANINGS = {"judgments", "clusters", "meanings", "meaning_metrics"}


# ---------------------------------------------------------------- made by sampling


def write_prompts(path: Path, *texts: str) -> Path:
    """A JSONL file of these prompts."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def ingest_arguments(root: Path, model: Path, prompts: Path, **more: object) -> list[str]:
    """The command line that samples RUN; ``more`` adds options or replaces them."""
    settings = {
        "store": root,
        "model": model,
        "family": "chain",
        "variant": "base",
        "task": "walk",
        "prompts": prompts,
        "samples": 30,
        "max-new-tokens": 60,
        "seed": 5,
        "batch-size": 30,
        "prompts-per-shard": 1,
        **more,
    }
    return ["ingest", "rollouts", *(x for k, v in settings.items() for x in (f"--{k}", str(v)))]


def fill(root: Path, chain: Path, prompts: Path) -> Path:
    """A store with rows in every table: sampled rollouts, made-up embeddings, rewards and scores."""
    from canopy_store.cli import main

    more = {"top-k": 5, "top-logprobs": 3, "samples": 12, "prompts-per-shard": 2}
    assert main(ingest_arguments(root, chain, prompts, **more)) == 0
    rng = np.random.default_rng(0)
    policy = {"temperature": 1.0}
    names = {"embeddings": "E", "rewards": "R", "grades": "G", "scores": "S"}
    made: dict[str, list[Path]] = {table: [] for table in names}
    for number, path in enumerate(store.files(root, "rollouts")):
        rows = store.read_rows(path)
        keys = {name: rows[name] for name in ("run_id", "prompt_id", "sample")}
        ids, samples = keys["prompt_id"].to_pylist(), keys["sample"].to_pylist()
        vectors = rng.normal(size=(len(rows), 8))
        made["embeddings"] += write_embeddings(root, "E", RUN, number, ids, samples, vectors)
        scored = {c.name: rows[c.name] for c in TABLES["scores"].columns if c.name in rows.column_names}
        columns = {
            "rewards": {"reward": rng.normal(size=len(rows))},
            "grades": {
                "answer": ids,
                "correct": [sample % 3 == 0 for sample in samples],
                "score": rng.uniform(size=len(rows)),
            },
            "scores": {**scored, "policy": [store.canonical(policy)] * len(rows)},
        }
        for table, values in columns.items():
            where = store.folder(root, table, **{TABLES[table].partitions[0]: names[table]}, run=RUN)
            end = f".{store.content_id(policy)}" if table == "scores" else ""
            made[table].append(where / f"part-{number:05d}{end}.parquet")
            store.write_rows(made[table][-1], table, {**keys, **values})
    for table, files in made.items():
        key = TABLES[table].partitions[0]
        of = {key: names[table], "policy": store.content_id(policy), "run": RUN}
        of = {name: of[name] for name in TABLES[table].commit}
        store.plan(root, TABLES[table].plan, names[table], {key: names[table]})
        store.commit(root, table, of, files, {key: names[table]})
    canopy_store.select_reward(root, 0.5)
    judge(root)
    return root


def judge(root: Path) -> None:
    """Judgments of which rollouts got one answer of the grader G, and their clusters."""
    from canopy_store.ingest.clusters import ingest_clusters
    from canopy_store.ingest.judge import ingest_judgments

    ingest_judgments(root, "J", "grades", grader="G", subsample=4)
    ingest_clusters(root, "J")


# ---------------------------------------------------------------- made by an import


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A Parquet file of these rows."""
    pl.DataFrame(rows).write_parquet(path)
    return path


def rollout_rows(variant="base", lengths=(1, 2, 3, 4, 5), prompts=("p",), task="t", **more):
    """Rollouts of these lengths for each prompt; a further column holds one value a rollout."""
    return [
        {
            "family": "f",
            "variant": variant,
            "task": task,
            "prompt_id": p,
            "sample": i,
            "entropy": [0.5 + 0.1 * i] * n,
            **{name: values[i] for name, values in more.items()},
        }
        for p in prompts
        for i, n in enumerate(lengths)
    ]


def import_golden(root: Path) -> Path:
    """A store of the golden rollouts."""
    canopy_store.import_rollouts(root, GOLDEN_ROLLOUTS, max_new_tokens=EXPECTED["max_new_tokens"])
    return root


def import_alpha(root: Path, file: Path, prompts: int) -> Path:
    """A store of so many golden prompts of a task, of family alpha, with every column of a rollout."""
    rows = pl.read_parquet(GOLDEN_ROLLOUTS)
    rows = rows.filter(pl.col("family") == "alpha", pl.col("prompt_id") < prompts)
    steps = pl.col("entropy")
    rows = rows.with_columns(
        text=pl.format("text of {}", "sample"),
        token_ids=steps.cast(pl.List(pl.Int32)),
        logprob=steps.list.eval(-pl.element()),
        eos_logprob=steps.list.eval(pl.element() * 0 - 5),
    )
    rows.write_parquet(file)
    canopy_store.import_rollouts(root, file, max_new_tokens=64)
    canopy_store.select_reward(root, 0.7)
    return root


def write_scores(
    root: Path,
    policy: dict[str, Any],
    logprobs: dict[tuple[str, int], list[float]],
    run: str = "f.base.t",
    scorer_id: str = "f/base",
) -> None:
    """Commits scores of a run: a list of log-probabilities of each rollout, by prompt and sample."""
    keys = {"scorer_id": scorer_id, "policy": store.content_id(policy), "run": run}
    where = store.folder(root, "scores", scorer_id=scorer_id, run=run)
    path = where / f"part-00000.{keys['policy']}.parquet"
    columns = {
        "run_id": [run] * len(logprobs),
        "prompt_id": [prompt for prompt, _ in logprobs],
        "sample": [sample for _, sample in logprobs],
        "policy": [store.canonical(policy)] * len(logprobs),
        "logprob": list(logprobs.values()),
        "entropy": [[0.5] * len(steps) for steps in logprobs.values()],
        "entropy_sum": [0.5 * len(steps) for steps in logprobs.values()],
        "surprisal_sum": [-sum(steps) for steps in logprobs.values()],
    }
    store.write_rows(path, "scores", columns)
    store.commit(root, "scores", keys, [path], {})


# ---------------------------------------------------------------- written row by row


def write_documents(root: Path, corpus: str, rows: list[dict[str, Any]]) -> None:
    """Commits a corpus: of each document its id and text, and other columns where they matter."""
    path = store.shard_path(store.folder(root, "documents", corpus=corpus), 0)
    usual = {"split": "all", "cluster": "c", "n_bytes": 1}
    columns = [column.name for column in TABLES["documents"].columns]
    made = [{**usual, **row} for row in rows]
    store.write_rows(path, "documents", {name: [row.get(name) for row in made] for name in columns})
    store.commit(root, "documents", {"corpus": corpus}, [path], {})


def write_document_scores(root: Path, scorer: dict[str, Any], corpus: str, rows: dict[str, Any]) -> str:
    """Commits a scorer (family, variant and more) and its tokens and logprobs of each document."""
    names = {key: scorer[key] for key in ("family", "variant")}
    scorer_id = scorer.get("scorer_id") or ".".join(names.values())
    model_id = store.add_model(root, names)
    add_scorer(root, {"template": "plain", **scorer, "scorer_id": scorer_id, "model_id": model_id})
    keys = {"scorer_id": scorer_id, "corpus": corpus}
    path = store.shard_path(store.folder(root, "document_scores", **keys), 0)
    logprobs = [logprob for _, logprob in rows.values()]
    tokens = [words for words, _ in rows.values()]
    columns = {
        "document_id": list(rows),
        "tokens": tokens,
        "token_ids": [words and [sum(map(ord, word)) for word in words] for words in tokens],
        "logprob": logprobs,
        "entropy": logprobs,
        "n_tokens": [len(each) for each in logprobs],
        "n_bytes": [sum(len(t.encode()) for t in words or "ab") for words in tokens],
        "logprob_sum": [float(sum(each)) for each in logprobs],
        "entropy_sum": [0.0] * len(rows),
    }
    store.write_rows(path, "document_scores", columns)
    store.commit(root, "document_scores", keys, [path], {})
    return scorer_id


def write_work(root: Path, scorer_id: str, corpus: str, shards: list[dict[str, Any]]) -> None:
    """Commits what the shards of a scorer's job over a corpus took, without what they made."""
    path = store.folder(root, "work", kind="document_scores", name=scorer_id, run=corpus)
    path = store.shard_path(path, 0)
    rows = [{"run_id": corpus, "shard": n, "rows": 1, **row} for n, row in enumerate(shards)]
    columns = [column.name for column in TABLES["work"].columns]
    store.write_rows(path, "work", {key: [row.get(key) for row in rows] for key in columns})
    store.commit(root, "document_scores", {"scorer_id": scorer_id, "corpus": corpus}, [path], {})


# ---------------------------------------------------------------- damaged


def flip(path: Path, place: int, mask: int) -> None:
    """Flips the bits of ``mask`` in one byte of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= mask
    path.write_bytes(data)


def enter(root: Path, path: Path) -> None:
    """Enters a file as it now is in every record that names it, as who edits it on purpose would."""
    name = path.relative_to(root).as_posix()
    for record in store.records(root):
        if name in record.files:
            files = {**record.files, name: store.entry(path)}
            store.write_record(root, dataclasses.replace(record, files=files))


def rewrite(path: Path, table: str, change: Callable[[dict[str, list[Any]]], Any]) -> None:
    """Changes a file's columns and writes it as the package would."""
    columns = store.read_rows(path).to_pydict()
    changed = change(columns)
    columns = columns if changed is None else changed
    size = {"embedding_dim": len(columns["embedding"][0])} if table == "embeddings" else {}
    store.write_rows(path, table, columns, **size)


def as_format_1(root: Path) -> Path:
    """The same store in format 1, as far as that had its tables."""
    committed = {table: store.files(root, table) for table in TABLES}
    for table, paths in committed.items():
        for path in paths:
            rows = store.read_rows(path)
            path.unlink()
            store.remove_empty(root, path.parent)
            if table in ("grades", "judgments", "clusters", "work"):
                continue
            size = rows["embedding"].type.list_size if table == "embeddings" else None
            schema = arrow_schema(table, size, version=1)
            values = store.path_keys(table, path.relative_to(root).as_posix()) or {}
            if table in ("models", "runs"):  # whose files stood side by side
                path = root / table / f"{'--'.join(map(store.quoted, values.values()))}.parquet"
            store.write_table(path, table, rows.select(schema.names).cast(schema))
    shutil.rmtree(root / "commits")
    (root / "canopy.json").write_text(json.dumps({"format": "canopy_store", "version": 1}))
    return root


# ---------------------------------------------------------------- looked at


def rollouts(root: object) -> pl.DataFrame:
    """Every rollout of complete runs, in the order of their keys."""
    return canopy_store.read(str(root), "rollouts").sort("run_id", "prompt_id", "sample")


def tables(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Every table's rows, in an order of their own."""
    with canopy_store.open(root) as con:
        return {t: sorted(con.sql(f"from {t}").pl().to_dicts(), key=str) for t in TABLES}


def views(root: Path) -> dict[str, pl.DataFrame]:
    """Every view, sorted; one thread, so that sums are added up in one order."""
    found = {}
    with duckdb.connect(config={"threads": 1}) as con:
        sql.create_views(con, root)
        for view in sql.VIEWS:
            frame = con.sql(f"from {view}").pl()
            keys = sql.source(view).splitlines()[1].removeprefix("-- keys: ").split(", ")
            found[view] = frame.sort(keys)
    return found


def same_views(one: dict[str, pl.DataFrame], other: dict[str, pl.DataFrame]) -> bool:
    """Whether every view is the same to the last bit."""
    return all(one[view].equals(other[view]) for view in sql.VIEWS)


def contents(root: Path) -> dict[str, str]:
    """The hash of every file under a folder, by its path."""
    return {str(p.relative_to(root)): store.sha256(p) for p in root.rglob("*") if p.is_file()}


def table_hashes(root: Path, *names: str) -> dict[str, str]:
    """The hash of every file of these tables, by its path."""
    return {str(p.relative_to(root)): store.sha256(p) for t in names for p in store.files(root, t)}


def shell(root: Path, query: str) -> list[dict]:
    """What a plain DuckDB shell, in the store's folder, answers."""
    program = Path(sys.executable).parent / "duckdb"
    done = subprocess.run(
        [program, "-json", "-readonly", "canopy.duckdb", query],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout or "[]")


def refused(result: tuple[int, str, str], code: int, *parts: str) -> None:
    """Asserts the exit code and one line on stderr that holds every part."""
    assert result[0] == code, result
    lines = result[2].strip().splitlines()
    assert len(lines) == 1, result[2]
    assert lines[0].startswith("canopy: ")
    for part in parts:
        assert part in lines[0], lines[0]
