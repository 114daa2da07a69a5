"""A job over a file of items, and one over the shards of any table: as easy as one over rollouts.

The tables are made for the test: items, what a scorer makes of them, and what another job makes of that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import canopy_store
from canopy_store import schema, store
from canopy_store.errors import ConflictError, UsageError
from canopy_store.ingest.jobs import Columns, Group, Job, Unit, run_job, shard_group
from canopy_store.ingest.progress import Progress
from canopy_store.schema import Column, Table

ITEM = Column("item_id", "VARCHAR", "The item.")
QUIZZES = Table(
    "quizzes",
    "one row per item",
    ("task", "item_id"),
    (ITEM, Column("text", "VARCHAR", "What is asked.", required=False)),
    ("task",),
    commit=("task",),
    texts=("text",),
)
ANSWERS = Table(
    "answers",
    "one row per item under a scorer",
    ("task", "item_id", "scorer_id"),
    (ITEM, Column("length", "INTEGER", "Letters of the text.")),
    ("scorer_id", "task"),
    commit=("scorer_id", "task"),
    brings=("work",),
    parent="quizzes",
    plan="answers",
)
DOUBLES = Table(
    "doubles",
    "one row per answer under a name",
    ("task", "item_id", "grader"),
    (ITEM, Column("twice", "INTEGER", "Twice its letters.")),
    ("grader", "task"),
    commit=("grader", "task"),
    brings=("work",),
    parent="quizzes",
    plan="doubles",
)


@pytest.fixture(autouse=True)
def _tables(monkeypatch: pytest.MonkeyPatch) -> None:
    for table in (QUIZZES, ANSWERS, DOUBLES):
        monkeypatch.setitem(schema.TABLES, table.name, table)
        for column in table.columns:
            monkeypatch.setitem(schema.COLUMNS, column.name, column)


@pytest.fixture
def items(tmp_path: Path) -> Path:
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(json.dumps({"item_id": f"i{n}", "text": "x" * n}) for n in range(10)))
    return path


def open_answers(
    root: Path, items: Path, *, name: str, task: str, progress: Progress, broken_at: int | None = None
) -> Job:
    """The job: what a file of items becomes, four items a shard."""
    root = store.init(root)
    lines = [json.loads(line) for line in items.read_text().splitlines()]
    if store.record(root, "quizzes", task=task) is None:
        path = store.shard_path(store.folder(root, "quizzes", task=task), 0)
        columns = {key: [line[key] for line in lines] for key in ("item_id", "text")}
        store.write_rows(path, "quizzes", columns)
        store.commit(root, "quizzes", {"task": task}, [path], {})
    keys = {"scorer_id": name, "task": task}
    where = store.folder(root, "answers", **keys)

    def units(group: Group) -> list[Unit]:
        return [
            Unit(group, n, len(lines[at : at + 4]), store.shard_path(where, n))
            for n, at in enumerate(range(0, len(lines), 4))
        ]

    def rows(unit: Unit, progress: Progress) -> tuple[Columns, int]:
        if unit.number == broken_at:
            raise KeyboardInterrupt
        part = lines[4 * unit.number : 4 * unit.number + 4]
        return {
            "item_id": [line["item_id"] for line in part],
            "length": [len(line["text"]) for line in part],
        }, 7

    return Job(
        root, "answers", name, {"scorer": name, "n": len(lines)}, [Group(keys, len(lines), units)], rows
    )


def open_doubles(root: Path, *, name: str, progress: Progress) -> Job:
    """The job over another's shards."""
    root = store.writable(root)

    def rows(unit: Unit, progress: Progress) -> tuple[Columns, int]:
        part = store.read_rows(unit.source, ["item_id", "length"]).to_pydict()
        return {"item_id": part["item_id"], "twice": [2 * n for n in part["length"]]}, 0

    groups = [shard_group(root, "doubles", name, each) for each in store.records(root, "answers")]
    return Job(root, "doubles", name, {}, groups, rows)


def answer(root: Path, items: Path, name: str = "m", task: str = "quiz", **options: Any) -> str:
    return run_job(root, open_answers, {"items": items, "name": name, "task": task, **options})


def sound(root: Path) -> bool:
    return canopy_store.verify(root).is_empty()


def test_a_job_over_items_is_shown_once_it_is_whole(tmp_path: Path, items: Path) -> None:
    root = tmp_path / "S"
    with pytest.raises(KeyboardInterrupt):
        answer(root, items, broken_at=2)
    assert canopy_store.read(root, "answers").is_empty()
    problems = canopy_store.verify(root)
    assert problems["harmless"].all()
    assert "answers m, which is not done with task quiz" in problems["what"][0]
    assert answer(root, items) == "m"
    shown = canopy_store.read(root, "answers").sort("length")
    assert shown["length"].to_list() == list(range(10))
    assert set(shown["task"]) == {"quiz"}
    work = canopy_store.read(root, "work")
    assert work["shard"].sort().to_list() == [0, 1, 2]
    assert set(work["run_id"]) == {"quiz"}
    assert work["tokens"].sum() == 21
    assert sound(root)
    assert canopy_store.status(root).is_empty()  # there is no run


def test_jobs_share_the_items_and_a_lost_shard_is_made_again(tmp_path: Path, items: Path) -> None:
    root = tmp_path / "S"
    for part in ("1/2", "2/2"):
        assert canopy_store.read(store.init(root), "answers").is_empty()
        answer(root, items, shard=part)
    assert len(canopy_store.read(root, "answers")) == 10
    (path,) = (
        root / name
        for name in store.record(root, "answers", scorer_id="m", task="quiz").files
        if name.endswith("part-00001.parquet")
    )
    path.unlink()
    assert "not there" in canopy_store.verify(root)["what"][0]
    answer(root, items)
    assert len(canopy_store.read(root, "answers")) == 10
    assert sound(root)


@pytest.mark.parametrize("kept", ["rows", "numbers"])
def test_shards_numbered_anew_by_a_merge_are_not_taken_for_others(
    tmp_path: Path, items: Path, kept: str
) -> None:
    source, root = tmp_path / "S", tmp_path / "T"
    answer(source, items)
    with pytest.raises(KeyboardInterrupt):
        answer(root, items, broken_at=1)
    (stray,) = store.matching(store.folder(root, "answers", scorer_id="m", task="quiz"), "*.parquet")
    pq.write_table(pq.read_table(stray), stray, compression="none")  # the same rows in other bytes
    canopy_store.merge([source], root)
    record = store.record(root, "answers", scorer_id="m", task="quiz")
    assert store.shard_number(Path(record.of("answers")[0])) == 1
    (root / record.of("answers")[-1 if kept == "rows" else 0]).unlink()
    answer(root, items)
    shown = canopy_store.read(root, "answers").sort("length")
    assert shown["length"].to_list() == list(range(10))
    assert sound(root)


def test_a_job_that_is_refused_leaves_the_record_of_one_that_lost_a_shard(
    tmp_path: Path, items: Path
) -> None:
    root = tmp_path / "S"
    answer(root, items)
    record = store.record(root, "answers", scorer_id="m", task="quiz")
    (root / record.of("work")[0]).unlink()
    with (
        store.holding(root, "quiz", key="task", exclusive=True),
        pytest.raises(ConflictError, match="in use"),
    ):
        answer(root, items)
    assert store.record(root, "answers", scorer_id="m", task="quiz") == record
    with pytest.raises(canopy_store.DataError, match="lost"):
        canopy_store.read(root, "work")


@pytest.mark.parametrize("task", ["", " ", "a\nb", "x" * 300])
def test_what_a_job_is_over_has_a_name_that_a_folder_can_have(
    tmp_path: Path, items: Path, task: str
) -> None:
    def opened(root: Path, *, progress: Progress) -> Job:
        return Job(store.init(root), "answers", "m", {}, [Group({"task": task}, 1, lambda group: [])], f)

    def f(unit: Unit, progress: Progress) -> tuple[Columns, int]:
        raise AssertionError

    with pytest.raises(UsageError, match="--task"):
        run_job(tmp_path / "S", opened, {})


def test_other_settings_and_odd_options_are_refused(tmp_path: Path, items: Path) -> None:
    root = tmp_path / "S"
    answer(root, items)
    items.write_text(items.read_text() + '\n{"item_id": "late", "text": ""}')
    with pytest.raises(ConflictError, match="answers m is stored with other settings: n"):
        answer(root, items)
    with pytest.raises(UsageError, match="did you mean broken_at"):
        answer(root, items, broken_att=1)


def test_one_job_at_a_time_holds_a_task(tmp_path: Path, items: Path) -> None:
    root = tmp_path / "S"
    answer(root, items)
    with (
        store.holding(root, "quiz", key="task", exclusive=True),
        pytest.raises(ConflictError, match="task quiz: in use"),
    ):
        answer(root, items, name="m2")
    with store.holding(root, "quiz", exclusive=True):  # a run of that name is another thing
        answer(root, items, name="m2")


def test_a_job_over_the_shards_of_any_table(tmp_path: Path, items: Path) -> None:
    root = tmp_path / "S"
    answer(root, items)
    answer(root, items, task="other")
    run_job(root, open_doubles, {"name": "d"})
    shown = canopy_store.read(root, "doubles").group_by("task").agg("twice")
    assert {task: sum(twice) for task, twice in shown.iter_rows()} == {"quiz": 90, "other": 90}
    assert sound(root)


def test_what_a_task_is_missing_its_items_is_hidden_and_named(tmp_path: Path, items: Path) -> None:
    root = tmp_path / "S"
    answer(root, items)
    store.record(root, "quizzes", task="quiz").path(root).unlink()
    assert canopy_store.read(root, "answers").is_empty()
    said = canopy_store.verify(root)["what"].to_list()
    assert "of task quiz, which is not complete; no view shows it" in said


def test_answers_without_their_item_are_named(tmp_path: Path, items: Path) -> None:
    root = tmp_path / "S"
    answer(root, items)
    record = store.record(root, "quizzes", task="quiz")
    path = root / next(iter(record.files))
    store.write_table(path, "quizzes", store.read_rows(path).slice(0, 9))
    store.commit(root, "quizzes", {"task": "quiz"}, [path], {})
    assert canopy_store.verify(root)["what"].to_list() == [
        "1 rows have no item, first task quiz item i9"
    ]


def test_items_travel_with_what_was_made_of_them(tmp_path: Path, items: Path) -> None:
    root, there = tmp_path / "S", tmp_path / "T"
    answer(root, items)
    folder = canopy_store.export(root, tmp_path / "out")
    for _ in range(2):
        assert canopy_store.pull(folder, there) == []
        assert canopy_store.merge([root], there) == []
    for table in ("quizzes", "answers", "work"):
        assert canopy_store.read(there, table).equals(canopy_store.read(root, table))
    assert sound(there)
    answer(there, items)  # done already
    bare = canopy_store.export(root, tmp_path / "bare", text=False)
    assert canopy_store.read(bare, "quizzes")["text"].null_count() == 10
    canopy_store.pull(bare, tmp_path / "U")
    canopy_store.pull(folder, tmp_path / "U")
    assert canopy_store.read(tmp_path / "U", "quizzes")["text"].null_count() == 0


def test_items_that_differ_are_not_merged(tmp_path: Path, items: Path) -> None:
    answer(tmp_path / "S", items)
    items.write_text(items.read_text().replace("xx", "yy"))
    answer(tmp_path / "T", items)
    with pytest.raises(ConflictError, match="other values of text"):
        canopy_store.merge([tmp_path / "S"], tmp_path / "T")
