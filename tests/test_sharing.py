"""Export, pull, push and remove: nothing is lost on the way, nothing foreign is taken on trust."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stores import contents, flip, import_alpha, rewrite, same_views, shell, tables, views

import canopy_store
from canopy_store import sql, store
from canopy_store.schema import TABLES, arrow_schema
from canopy_store.sharing import export, pull, push, untrusted
from canopy_store.sharing.export import _no_token
from canopy_store.sharing.merge import merge
from canopy_store.upkeep.verify import verify

RUNS = [
    f"alpha.{variant}.{task}" for variant in ("base", "instruct") for task in ("coding", "completion")
]


PROMPTS = 4  # of each task


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    """A store of four runs, for reading only."""
    folder = tmp_path_factory.mktemp("origin")
    return import_alpha(folder / "s", folder / "in.parquet", PROMPTS)


@pytest.fixture(scope="module")
def shared(origin) -> Path:
    """What `export` makes of it, for reading only."""
    return export(origin, origin.parent / "shared", license="cc-by-4.0")


@pytest.fixture
def folder(shared, tmp_path) -> Path:
    return Path(shutil.copytree(shared, tmp_path / "got"))


@pytest.fixture(scope="module")
def measured(origin) -> dict[str, pl.DataFrame]:
    return views(origin)


# ---------------------------------------------------------------- there and back


def test_an_export_is_a_store_and_comes_back_to_the_last_bit(origin, shared, measured, tmp_path):
    assert same_views(views(shared), measured)
    assert verify(shared, deep=True).is_empty()
    assert pull(shared, tmp_path / "back") == RUNS
    assert same_views(views(tmp_path / "back"), measured)
    assert tables(tmp_path / "back") == tables(origin)
    assert verify(tmp_path / "back", deep=True).is_empty()
    before = contents(tmp_path / "back")
    assert pull(shared, tmp_path / "back") == RUNS  # twice is once
    after = contents(tmp_path / "back")
    assert {**after, "canopy.duckdb": ""} == {**before, "canopy.duckdb": ""}


def test_without_texts_every_measure_is_there_and_texts_can_come_later(
    origin, shared, measured, tmp_path
):
    out = export(origin, tmp_path / "out", text=False)
    found = views(out)
    assert found["selected_rollouts"]["text"].null_count() == len(found["selected_rollouts"])
    hidden = ("text", "token_ids", "top_token_ids")
    for view, frame in measured.items():
        left = [name for name in frame.columns if name not in hidden]
        assert found[view].select(left).equals(frame.select(left)), view
    written = b"".join(p.read_bytes() for p in out.rglob("*") if p.is_file())
    assert not re.search(rb"text of \d", written)
    pull(out, tmp_path / "back")
    bare = store.files(tmp_path / "back", "rollouts")
    assert pull(shared, tmp_path / "back") == RUNS  # the same runs, with texts: they are filled in
    assert same_views(views(tmp_path / "back"), measured)
    assert tables(tmp_path / "back") == tables(origin)
    assert verify(tmp_path / "back", deep=True).is_empty()
    assert not [path for path in bare if path.exists()]  # no reader takes the new files for the old
    before = contents(tmp_path / "back")
    pull(out, tmp_path / "back")  # and stay
    assert {**contents(tmp_path / "back"), "canopy.duckdb": ""} == {**before, "canopy.duckdb": ""}


def test_parts_of_a_store_and_the_whole_again(origin, shared, measured, tmp_path):
    where = "variant = 'base' and task = 'coding'"
    out = export(origin, tmp_path / "a", where=where, tables=["rewards"])
    assert [row["run_id"] for row in canopy_store.read(out, "runs").to_dicts()] == ["alpha.base.coding"]
    assert set(canopy_store.read(out, "prompts")["task"]) == {"coding"}
    assert len(canopy_store.read(out, "models")) == 1
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == [
        "commits",
        "models",
        "plans",
        "prompts",
        "rewards",
        "rollouts",
        "runs",
    ]
    out = export(origin, tmp_path / "b", embeddings=False)
    assert not (out / "embeddings").exists()
    assert canopy_store.read(out, "prompt_metrics")["vendi_score"].null_count() == 0
    for part in (tmp_path / "a", tmp_path / "b", shared):
        pull(part, tmp_path / "whole")
    assert same_views(views(tmp_path / "whole"), measured)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": "family = 'nobody'"}, "no complete run where"),
        ({"where": "famly = 'a'"}, "--where famly"),
        ({"where": "true); drop view runs; select (1"}, "--where"),
        ({"where": "run_id in (select content from read_text('/etc/passwd'))"}, "--where"),
        ({"tables": ["rolouts"]}, "no table 'rolouts'"),
        ({"license": "a\nb: c"}, "license"),
    ],
)
def test_an_export_that_is_refused_leaves_nothing(origin, tmp_path, options, message):
    with pytest.raises(canopy_store.CanopyError, match=message):
        export(origin, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_export_neither_replaces_nor_nests_nor_passes_on_damage(origin, tmp_path):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path, tmp_path / "file", origin / "inside"):
        with pytest.raises(canopy_store.UsageError, match="choose"):
            export(origin, place)
    broken = Path(shutil.copytree(origin, tmp_path / "broken"))
    path = store.files(broken, "rollouts")[0]
    rewrite(path, "rollouts", lambda c: c["entropy_sum"].__setitem__(0, 9.0))
    with pytest.raises(canopy_store.DataError, match="changed while it was read"):
        export(broken, tmp_path / "out")
    record(broken, path)
    with pytest.raises(canopy_store.DataError, match="entropy_sum is not the sum"):
        export(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_store_of_format_1_is_upgraded_before_it_is_exported(tmp_path):
    old = Path(__file__).parent / "data" / "format1" / "sampled"
    root = Path(shutil.copytree(old, tmp_path / "s"))
    with pytest.raises(canopy_store.StoreError, match="canopy upgrade --store"):
        export(root, tmp_path / "out")
    assert os.listdir(tmp_path) == ["s"]


def test_what_a_killed_export_left_is_removed_and_a_living_one_is_left_alone(origin, tmp_path):
    folder = tmp_path / ".out.0000abcd.exporting"
    (folder / "rollouts").mkdir(parents=True)
    living = tmp_path / ".out.0000abce.exporting"
    living.mkdir()
    held = os.open(living, os.O_RDONLY)
    assert store.lock(held)
    (tmp_path / ".out.0000abcf.exporting").symlink_to(origin)
    export(origin, tmp_path / "out")
    os.close(held)
    assert sorted(os.listdir(tmp_path)) == [living.name, ".out.0000abcf.exporting", "out"]
    assert (origin / "canopy.json").exists()


def test_names_that_are_hostile_travel(tmp_path):
    names = ["../../up", "'; drop view runs; --", "ü%41 =", "*[x]? {{: |"]
    pl.DataFrame(
        [
            {
                "family": name,
                "variant": "v/1",
                "task": "t=1",
                "prompt_id": name,
                "sample": 0,
                "entropy": [1.0],
            }
            for name in names
        ]
    ).write_parquet(tmp_path / "in.parquet")
    canopy_store.import_rollouts(tmp_path / "s", tmp_path / "in.parquet")
    out = export(tmp_path / "s", tmp_path / "o: [x] 'y'\u2028")
    pull(out, tmp_path / "back")
    assert tables(tmp_path / "back") == tables(tmp_path / "s")
    assert sorted(canopy_store.read(tmp_path / "back", "model_metrics")["family"]) == sorted(names)
    assert canopy_store.read(out, "runs")["family"].is_in(names).all()
    import yaml

    head = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert head["configs"][0]["config_name"] == "models"


# ---------------------------------------------------------------- other people's programs


def test_datasets_loads_every_table(shared, tmp_path):
    import datasets
    import yaml

    datasets.disable_progress_bars()
    head = yaml.safe_load((shared / "README.md").read_text().split("---")[1])
    assert head["license"] == "cc-by-4.0"
    names = [config["config_name"] for config in head["configs"]]
    assert datasets.get_dataset_config_names(str(shared)) == names
    features = {info["config_name"]: info["features"] for info in head["dataset_info"]}
    for table in names:
        found = datasets.load_dataset(str(shared), table, split="train", cache_dir=str(tmp_path))
        wanted = canopy_store.read(shared, table)
        assert len(found) == len(wanted)
        # the whole table, what stands in the paths included
        assert found.column_names == wanted.columns
        keys = list(TABLES[table].keys)
        rows = found.select_columns(keys).to_polars()
        assert sorted(rows.rows()) == sorted(wanted.select(keys).rows())
        derived = datasets.Features.from_arrow_schema(arrow_schema(table))
        assert datasets.Features._from_yaml_list(features[table]) == derived
    rollouts = datasets.load_dataset(str(shared), split="train", cache_dir=str(tmp_path))  # the default
    assert (
        rollouts[0]["entropy"]
        == pl.read_parquet(store.files(shared, "rollouts")[0])["entropy"][0].to_list()
    )


def test_pandas_polars_and_duckdb_read_it(shared, origin, measured):
    import pandas as pd

    count = len(canopy_store.read(origin, "rollouts"))
    frame = pd.read_parquet(shared / "rollouts", partitioning=None)
    assert len(frame) == count
    assert set(frame["variant"]) == {"base", "instruct"}
    lazy = pl.scan_parquet(shared / "rollouts")
    assert len(lazy.filter(variant="base").collect()) == count // 2
    query = "select " + ", ".join(f"(select count(*) from {view}) as {view}" for view in sql.VIEWS)
    assert shell(shared, query) == [{view: len(frame) for view, frame in measured.items()}]
    program = Path(sys.executable).parent / "duckdb"
    done = subprocess.run(
        [program, "-json", "-init", "views.sql", ":memory:", "select count(*) as n from rollouts"],
        cwd=shared,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert json.loads(done.stdout) == [{"n": count}], done.stderr


def test_croissant_is_valid_and_gives_records(shared, origin):
    import mlcroissant

    described = mlcroissant.Dataset(jsonld=str(shared / "croissant.json"))
    assert not described.metadata.ctx.issues.errors
    assert not described.metadata.ctx.issues.warnings, described.metadata.ctx.issues.warnings
    for table in ("models", "prompts", "runs", "rollouts", "embedding_spectra", "rewards"):
        wanted = canopy_store.read(origin, table)
        records = described.records(table)
        first = next(iter(records))
        assert {name.partition("/")[2] for name in first} == set(wanted.columns)
        keys = {key: _plain(first[f"{table}/{key}"]) for key in TABLES[table].keys}
        row = wanted.filter(**keys).row(0, named=True)
        for name in ("n_tokens", "entropy", "family", "task", "embedder", "eigenvalues", "reward"):
            if name in row:
                assert _plain(first[f"{table}/{name}"]) == pytest.approx(row[name])


def _plain(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


# ---------------------------------------------------------------- pull: conflicts, breaks


def changed(
    folder: Path, table: str, change: Callable[[dict[str, list[Any]]], Any], which: int = 0
) -> None:
    """Edits a file of an exported folder and enters it in record and MANIFEST, as a forger would."""
    path = store.files(folder, table)[which]
    rewrite(path, table, change)
    enter(folder, record(folder, path))
    enter(folder, path)


def record(root: Path, path: Path, **said: Any) -> Path:
    """Enters a file, as it is now, in the record that names it; says where that stands."""
    name = path.relative_to(root).as_posix()
    (old,) = [each for each in store.records(root) if name in each.files]
    entry = {**store.entry(path), **said}
    store.write_record(root, replace(old, files={**old.files, name: entry}))
    return old.path(root)


def enter(folder: Path, path: Path, rows: int | None = None) -> None:
    manifest = json.loads((folder / "MANIFEST").read_text())
    if path.suffix == ".parquet" and rows is None:
        rows = pq.read_metadata(path).num_rows
    manifest["files"][path.relative_to(folder).as_posix()] = {
        "sha256": store.sha256(path),
        "bytes": path.stat().st_size,
        "rows": rows,
    }
    (folder / "MANIFEST").write_text(json.dumps(manifest))


def set_all(name: str, value: Any) -> Callable[[dict[str, list[Any]]], None]:
    return lambda columns: columns.__setitem__(name, [value] * len(columns[name]))


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("rewards", set_all("reward", 0.25), "other values of reward"),
        ("models", set_all("weights_sha256", "x"), "weights_sha256 .stored None, asked 'x'."),
        ("runs", set_all("max_new_tokens", 7), "max_new_tokens .stored 64, asked 7."),
        (
            "rollouts",
            lambda c: (
                set_all("finish_reason", None)(c)
                or c.__setitem__("finish_reason", ["stop"] * 3 + ["length"] * (len(c["sample"]) - 3))
            ),
            "other values of finish_reason",
        ),
    ],
)
def test_a_conflict_is_refused_with_what_differs(folder, shared, tmp_path, table, change, message):
    pull(shared, tmp_path / "s")
    before = contents(tmp_path / "s")
    changed(folder, table, change)
    with pytest.raises(canopy_store.ConflictError, match=message):
        pull(folder, tmp_path / "s")
    assert contents(tmp_path / "s") == before


def test_rules_travel_and_one_that_differs_is_refused(folder, origin, shared, tmp_path):
    """So that a store that was pulled can be gone on with under the same names."""
    plans = sorted(path.name for path in (origin / "plans").glob("*.json"))
    assert "selection=reward_top_70.json" in plans
    pull(shared, tmp_path / "s")
    assert sorted(path.name for path in (tmp_path / "s" / "plans").glob("*.json")) == plans
    assert canopy_store.select_reward(tmp_path / "s", 0.7) == "reward_top_70"  # the same: nothing new
    assert verify(tmp_path / "s", deep=True).is_empty()
    records = store.records(folder, "selections")
    changed = [folder / "plans" / "selection=reward_top_70.json", *(r.path(folder) for r in records)]
    for path in changed:
        path.write_text(re.sub('"keep": ?0.7', '"keep": 0.8', path.read_text()))
        enter(folder, path)
    before = contents(tmp_path / "s")
    said = r"selection reward_top_70 is stored with other values: keep .stored 0.7, asked 0.8"
    with pytest.raises(canopy_store.ConflictError, match=said):
        pull(folder, tmp_path / "s")
    assert contents(tmp_path / "s") == before


def test_a_run_that_is_begun_here_is_not_overwritten(shared, origin, tmp_path):
    root = Path(shutil.copytree(origin, tmp_path / "s"))
    path = next(p for p in store.files(root, "rollouts") if "alpha.base.coding" in str(p))
    store.commit_path(root, "rollouts", {"run": "alpha.base.coding"}).unlink()
    rewrite(path, "rollouts", lambda c: {k: v[:5] for k, v in c.items()})
    before = contents(root)
    with pytest.raises(canopy_store.ConflictError, match="begun here and not complete"):
        pull(shared, root)
    assert contents(root) == before


DRIVER = """
import os, sys, time
import canopy_store.sharing as sharing
real = os.fsync
def slow(fd):
    time.sleep(0.01)
    real(fd)
os.fsync = slow
sharing.pull(sys.argv[1], sys.argv[2])
"""


def test_a_pull_killed_again_and_again_ends_up_whole(shared, tmp_path, measured):
    root = tmp_path / "s"
    kills = 0
    for wait in (0.05, 0.4, 0.2):
        stored = len(list(root.rglob("*")))
        process = subprocess.Popen([sys.executable, "-c", DRIVER, shared, root])
        while process.poll() is None and len(list(root.rglob("*"))) == stored:
            time.sleep(0.002)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        if (root / "canopy.json").exists():
            seen = canopy_store.read(root, "rollouts")["run_id"].value_counts()
            assert set(seen["count"]) <= {PROMPTS * 20}  # some runs whole, the others hidden
    assert kills > 1
    assert pull(shared, root) == RUNS
    assert same_views(views(root), measured)
    assert verify(root).filter(~pl.col("harmless")).is_empty()


# ---------------------------------------------------------------- pull: hostile folders


def refused(folder: Path, tmp_path: Path, *parts: str) -> None:
    with pytest.raises(canopy_store.CanopyError) as error:
        pull(folder, tmp_path / "refused")
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "refused").exists()


def test_any_changed_byte_is_refused(folder, tmp_path):
    for name in sorted(json.loads((folder / "MANIFEST").read_text())["files"])[::5]:
        before = (folder / name).read_bytes()
        flip(folder / name, len(before) // 2, 16)
        refused(folder, tmp_path, name)
        (folder / name).write_bytes(before)


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "rollouts/../../x.parquet",
        "runs/..",
        "runs//x.parquet",
        "./runs/x.parquet",
        "runs\\x.parquet",
        "runs/x\n.parquet",
        "..",
        "",
    ],
)
def test_paths_out_of_the_folder_are_refused(folder, tmp_path, name):
    manifest = json.loads((folder / "MANIFEST").read_text())
    manifest["files"][name] = next(iter(manifest["files"].values()))
    (folder / "MANIFEST").write_text(json.dumps(manifest))
    refused(folder, tmp_path, "MANIFEST", "do not trust it")


@pytest.mark.parametrize(
    "name",
    [
        "setup.py",
        "pytorch_model.bin",
        "embeddings/embedder=E/model.pkl",
        "rollouts/x.parquet",
        "plans/../x.json",
        "plans/a/b.json",
        ".git/config",
        "rollouts/family=a/variant=b/task=c/run=../part-00000.parquet",
        "scores/scorer_id=a/run=b/evil.sh",
    ],
)
def test_files_that_no_export_writes_are_refused(folder, tmp_path, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"x")
    enter(folder, folder / name, rows=1) if ".." not in name else None
    if ".." in name:
        manifest = json.loads((folder / "MANIFEST").read_text())
        manifest["files"][name] = {"sha256": "0" * 64, "bytes": 1, "rows": 1}
        (folder / "MANIFEST").write_text(json.dumps(manifest))
    refused(folder, tmp_path, "MANIFEST")


def test_files_that_the_manifest_does_not_name_are_refused(folder, tmp_path):
    path = store.files(folder, "runs")[0]
    shutil.copy(path, path.with_name("other.parquet"))
    refused(folder, tmp_path, "other.parquet", "not in MANIFEST")


def test_links_out_of_the_folder_are_refused(folder, tmp_path):
    path = store.files(folder, "rollouts")[0]
    path.rename(tmp_path / "elsewhere.parquet")
    path.symlink_to(tmp_path / "elsewhere.parquet")
    refused(folder, tmp_path, "a link out of the folder")
    path.unlink()
    (tmp_path / "elsewhere.parquet").rename(path)
    (folder / "scores").symlink_to(tmp_path)
    refused(folder, tmp_path, "not in MANIFEST")
    (folder / "scores").unlink()
    (folder / "runs").rename(tmp_path / "runs")
    (folder / "runs").symlink_to(tmp_path / "runs")
    refused(folder, tmp_path, "a link out of the folder")


def not_regular(path: Path, what: str) -> None:
    """Puts something that is no file where one was; to open it would wait for ever, or never end."""
    path.unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "link to a pipe":
        os.mkfifo(path.with_name(f"{path.name}.pipe"))
        path.symlink_to(path.with_name(f"{path.name}.pipe"))
    elif what == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


@pytest.fixture
def in_time():
    """Ends a test that waits, as it would for a pipe that it opened."""

    def too_long(signum, frame):
        raise AssertionError("waited for what it should not have opened")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("what", ["pipe", "link to a pipe", "device", "folder"])
def test_only_regular_files_are_opened(folder, tmp_path, origin, what):
    """In a folder that is pulled, and in a store that is merged."""
    places = {
        "canopy.json",
        "MANIFEST",
        "plans/run=alpha.base.coding.json",
        "commits/rewards/reward_model=imported/run=alpha.base.coding.json",
        store.files(folder, "rewards")[0].relative_to(folder).as_posix(),
    }
    for name in sorted(places):
        # a folder in a store's own place of a record is an empty one: that job is not finished
        for root in (folder,) if what == "folder" else (folder, origin):
            copy = Path(shutil.copytree(root, tmp_path / "copy"))
            if (copy / name).exists():
                not_regular(copy / name, what)
                with pytest.raises(canopy_store.CanopyError) as error:
                    merge([copy], tmp_path / "merged")
                assert "\n" not in str(error.value)
                if root is folder:
                    refused(copy, tmp_path)
            shutil.rmtree(copy)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 10_000, "\0" * (5 << 20), ""])
def test_json_that_no_store_writes_is_one_line(folder, origin, tmp_path, text):
    for name in (
        "canopy.json",
        "plans/run=alpha.base.coding.json",
        "commits/rollouts/run=alpha.base.coding.json",
    ):
        before = (folder / name).read_text()
        (folder / name).write_text(text)
        enter(folder, folder / name)
        refused(folder, tmp_path, name)
        (folder / name).write_text(before)
        enter(folder, folder / name)
        copy = Path(shutil.copytree(origin, tmp_path / "copy"))
        (copy / name).write_text(text)
        with pytest.raises(canopy_store.CanopyError, match=name) as error:
            merge([copy], tmp_path / "refused")
        assert "\n" not in str(error.value)
        shutil.rmtree(copy)


def test_settings_that_are_nested_deeply_are_no_traceback(folder, tmp_path):
    """Each level that can be read must also be told, compared and written, or be refused in a line."""
    for depth in (100, 300, 900, 960, 980, 2000, 10_000):
        path = folder / "plans" / "run=alpha.base.coding.json"
        before = path.read_text()
        settings = json.dumps({**json.loads(before)["settings"], "more": "X"})
        nested = settings.replace('"X"', "[" * depth + "]" * depth)
        path.write_text(f'{{"settings": {nested}, "started_at": "2026-01-01T00:00:00"}}')
        enter(folder, path)
        refused(folder, tmp_path)
        path.write_text(before)
        enter(folder, path)


def test_a_plan_that_no_run_uses_stays_where_it_is(folder, tmp_path):
    """It would settle, beforehand, what a job of that name must do here."""
    run = json.loads((folder / "plans" / "run=alpha.base.coding.json").read_text())
    planted = {
        "embedder=mine": {"embedder": "mine", "model": "theirs"},
        "run=alpha.base.math": {**run["settings"], "run_id": "alpha.base.math"},
        "selection=later": {"rule": "reward", "keep": 0.1},
    }
    for name, settings in planted.items():
        path = folder / "plans" / f"{name}.json"
        path.write_text(json.dumps({**run, "settings": settings}))
        enter(folder, path)
    assert pull(folder, tmp_path / "s") == RUNS
    assert not {f"{name}.json" for name in planted} & set(os.listdir(tmp_path / "s" / "plans"))


def test_a_plan_that_its_job_did_not_have_is_refused(folder, tmp_path):
    path = folder / "plans" / "selection=reward_top_70.json"
    before = json.loads(path.read_text())
    for settings in ({"more": 1}, {"keep": 0.1}):
        path.write_text(json.dumps({**before, "settings": {**before["settings"], **settings}}))
        enter(folder, path)
        refused(folder, tmp_path, path.name, "settings are not those of commits/", *settings)


def test_a_plan_that_only_an_import_could_use_stays_where_it_is(folder, tmp_path):
    """Rewards that came with an import repeat none, and it would settle what a later job must do."""
    path = folder / "plans" / "reward_model=imported.json"
    path.write_text(json.dumps({"settings": {"reward_model": "x"}, "started_at": "2026-01-01T00:00:00"}))
    enter(folder, path)
    assert pull(folder, tmp_path / "s") == RUNS
    assert not (tmp_path / "s" / "plans" / path.name).exists()


def forge(folder: Path, kind: str, keys: dict[str, str], *names: str, **rows: int) -> None:
    """Adds a record that names these files of the folder, entered in the MANIFEST."""
    files = {name: {**store.entry(folder / name), **rows} for name in names}
    forged = store.Record(kind, keys, files, {}, "2026-01-01T00:00:00")
    store.write_record(folder, forged)
    enter(folder, forged.path(folder))


def test_a_record_names_only_what_is_of_it(folder, tmp_path):
    """Another run's rollouts under a record of rewards would be added to those that are stored."""
    run = "alpha.base.coding"
    (rollouts,) = (p for p in store.files(folder, "rollouts") if run in str(p))
    (other,) = (p for p in store.files(folder, "rewards") if "instruct.coding" in str(p))
    (spectra,) = (p for p in store.files(folder, "embedding_spectra") if f"all/run={run}" in str(p))
    more = rollouts.with_name("part-00007.parquet")
    shutil.copy(rollouts, more)
    enter(folder, more)
    name, others, spectrum = (p.relative_to(folder).as_posix() for p in (more, other, spectra))
    for kind, keys, named in (
        ("rewards", {"reward_model": "x", "run": run}, name),
        ("rewards", {"reward_model": "x", "run": run}, others),
        ("rewards", {"reward_model": "imported", "run": "alpha.base.completion"}, others),
        ("embeddings", {"embedder": "x", "run": run}, spectrum),
        ("embedding_spectra", {"embedder": "imported", "selection": "all", "run": run}, spectrum),
        ("scores", {"scorer_id": "s", "policy": "p", "run": run}, name),
        ("rollouts", {"run": "alpha.base.math"}, name),
    ):
        path = store.commit_path(folder, kind, keys)
        before = path.read_bytes() if path.exists() else None
        forge(folder, kind, keys, named)
        refused(folder, tmp_path, path.name, "which is not of it")
        path.unlink()
        if before is None:
            manifest = json.loads((folder / "MANIFEST").read_text())
            del manifest["files"][path.relative_to(folder).as_posix()]
            (folder / "MANIFEST").write_text(json.dumps(manifest))
        else:
            path.write_bytes(before)
            enter(folder, path)
    pull(folder, tmp_path / "s")
    assert not list((tmp_path / "s").rglob("part-00007*"))


def test_a_record_names_only_what_the_manifest_lists(folder, tmp_path):
    path = store.files(folder, "rewards")[0]
    for said in ({"rows": 3}, {"bytes": 1}, {"sha256": "0" * 64}):
        enter(folder, record(folder, path, **said))
        refused(folder, tmp_path, path.name, "not what MANIFEST lists")
    enter(folder, record(folder, path))
    path.rename(path.with_name("part-00003.parquet"))
    manifest = json.loads((folder / "MANIFEST").read_text())
    manifest["files"].pop(path.relative_to(folder).as_posix())
    (folder / "MANIFEST").write_text(json.dumps(manifest))
    enter(folder, path.with_name("part-00003.parquet"))
    refused(folder, tmp_path, path.name, "not what MANIFEST lists")


def test_a_run_without_its_row_is_refused(folder, tmp_path):
    old = store.record(folder, "rollouts", run="alpha.base.coding")
    left = {name: said for name, said in old.files.items() if not name.startswith("runs/")}
    store.write_record(folder, replace(old, files=left))
    enter(folder, old.path(folder))
    refused(folder, tmp_path, "lists no file of runs, which every run has")


def bomb_of_numbers(path: Path, schema: pa.Schema) -> None:
    """Long lists of one number: run lengths make kilobytes of 18 million values."""
    rows = store.read_rows(path).slice(0, 1)
    zeros = pa.array([0.0] * 2048, pa.float32())
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=True) as writer:
        lists = pa.ListArray.from_arrays(pa.array([0, 2048], pa.int32()), zeros)
        one = rows.set_column(
            schema.get_field_index("entropy"), "entropy", lists.cast(schema.field("entropy").type)
        )
        writer.write_table(pa.concat_tables([one] * 9000).cast(schema), row_group_size=9000)


def bomb_of_texts(path: Path, schema: pa.Schema) -> None:
    """One text of 64 kB in a dictionary, named by each of 50 thousand rows: 3 GB in 100 kB."""
    rows = store.read_rows(path).slice(0, 1)
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 50000, pa.int32()), pa.array(["x" * 65536]))
    columns = [
        texts
        if f.name == "text"
        else pa.nulls(50000, f.type)
        if f.nullable
        else pa.concat_arrays([rows[f.name].combine_chunks()] * 50000)
        for f in schema
    ]
    table = pa.table(dict(zip(schema.names, columns, strict=True)))
    with pq.ParquetWriter(path, table.schema, compression="zstd", store_schema=False) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"canopy_schema": "rollouts:2"})


def bomb_with_a_forged_footer(path: Path, schema: pa.Schema) -> None:
    """As the first, but the footer says that each list holds one number; the pages know better."""
    bomb_of_numbers(path, schema)
    data = path.read_bytes()
    size = int.from_bytes(data[-8:-4], "little") + 8
    true, said = (_varint(2 * n) for n in (9000 * 2048, 9000))  # zigzag doubles
    padded = bytes(b | 128 for b in said) + b"\x80" * (len(true) - len(said) - 1) + b"\0"
    assert true in data[-size:]
    path.write_bytes(data[:-size] + data[-size:].replace(true, padded))
    footer = pq.read_metadata(path).row_group(0)
    columns = [footer.column(i) for i in range(footer.num_columns)]
    assert sum(max(8 * c.num_values, c.total_uncompressed_size) for c in columns) < 1 << 27


def _varint(value: int) -> bytes:
    low = value & 127
    return bytes([low]) if value < 128 else bytes([low | 128]) + _varint(value >> 7)


def bomb_of_shared_beginnings(path: Path, schema: pa.Schema) -> None:
    """Texts that each repeat the one before: an encoding that no header tells the length of."""
    rows = store.read_rows(path).slice(0, 1)
    table = pa.concat_tables(
        [rows.set_column(schema.get_field_index("text"), "text", pa.array(["x" * 65536]))] * 3000
    ).cast(schema)
    with pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        use_dictionary=False,
        column_encoding={"text": "DELTA_BYTE_ARRAY"},
    ) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(
    "bomb", [bomb_of_numbers, bomb_of_texts, bomb_with_a_forged_footer, bomb_of_shared_beginnings]
)
def test_a_small_file_that_decodes_to_far_more_is_refused(folder, tmp_path, monkeypatch, bomb):
    monkeypatch.setattr(untrusted, "_DECODED", 1 << 27)  # an eighth of the limit, to be quick
    path = store.files(folder, "rollouts")[0]
    bomb(path, arrow_schema("rollouts"))
    assert path.stat().st_size < 1 << 20
    enter(folder, path)
    started = time.monotonic()
    said = "encoding that no export" if bomb is bomb_of_shared_beginnings else "do not trust it"
    refused(folder, tmp_path, said)
    assert time.monotonic() - started < 20


def test_rows_and_columns_that_are_not_what_they_say_are_refused(folder, tmp_path, shared):
    path = store.files(folder, "rewards")[0]
    enter(folder, path, rows=10**9)
    refused(folder, tmp_path, "MANIFEST says 1000000000 rows")
    names = ['"; drop table runs; --', "\x1b[2J\n", "../../etc"]
    label = {b"canopy_schema": b"rewards:2"}
    schema = pa.schema([pa.field(name, pa.int64()) for name in names], metadata=label)
    pq.write_table(schema.empty_table(), path)
    enter(folder, path)
    enter(folder, record(folder, path))
    refused(folder, tmp_path, "schema differs")
    path.write_bytes(b"PAR1 is not enough PAR1")
    enter(folder, path, rows=1)
    refused(folder, tmp_path, "truncated or not a Parquet file")
    shutil.copy(shared / path.relative_to(folder), path)
    changed(folder, "rewards", set_all("reward", float("nan")))
    refused(folder, tmp_path, "reward is not finite")


def test_a_forged_manifest_and_no_manifest_are_refused(folder, tmp_path):
    for text in ("", "[]", '{"files": []}', '{"version": 1, "files": {"a": {}}}', "[" * 100000):
        (folder / "MANIFEST").write_text(text)
        refused(folder, tmp_path, "not a readable MANIFEST")
    (folder / "MANIFEST").write_text('{"version": 99, "files": {}}')
    refused(folder, tmp_path, "format version 99")
    (folder / "MANIFEST").unlink()
    refused(folder, tmp_path, "no MANIFEST here")
    with pytest.raises(canopy_store.StoreError, match="no such folder"):
        pull(tmp_path / "nowhere", tmp_path / "refused")


@pytest.mark.parametrize("version", ["1e999", "-1e999", "NaN", "true", '"2"', "2.0", "null", "[2]"])
def test_a_version_that_is_no_whole_number_is_refused(folder, tmp_path, version):
    manifest = json.loads((folder / "MANIFEST").read_text())
    text = json.dumps({**manifest, "version": "@"}).replace('"@"', version)
    (folder / "MANIFEST").write_text(text)
    refused(folder, tmp_path, "not a readable MANIFEST")


@pytest.mark.parametrize("name", ["\ud800.json", "rollouts/\udc80/x.parquet", "x" * 5000])
def test_names_that_no_file_has_are_refused(folder, tmp_path, name):
    manifest = json.loads((folder / "MANIFEST").read_text())
    manifest["files"][name] = {"sha256": "0" * 64, "bytes": 1, "rows": None}
    (folder / "MANIFEST").write_text(json.dumps(manifest))
    refused(folder, tmp_path, "MANIFEST")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_a_manifest_that_is_no_file_is_refused(folder, tmp_path, make):
    (folder / "MANIFEST").unlink()
    make(folder / "MANIFEST")
    refused(folder, tmp_path, "MANIFEST: not a regular file")
    with pytest.raises(canopy_store.DataError, match="MANIFEST: not a regular file"):
        canopy_store.merge([folder], tmp_path / "refused")


def test_nothing_of_the_source_is_executed(folder, tmp_path):
    """The views of a pulled store are this package's; a forged canopy.duckdb is never opened."""
    path = folder / "canopy.duckdb"
    path.unlink()
    with duckdb.connect(path) as con:
        con.execute("create view model_metrics as select 'forged' as x")
    (folder / "views.sql").write_text("copy (select 1) to 'forged';")
    (folder / "canopy.py").write_text("raise SystemExit")
    for name in ("canopy.duckdb", "views.sql"):
        enter(folder, folder / name)
    assert pull(folder, tmp_path / "s") == RUNS
    assert "forged" not in shell(tmp_path / "s", "select * from model_metrics limit 1")[0]
    assert not {"views.sql", "canopy.py"} & set(os.listdir(tmp_path / "s"))


def test_a_pulled_store_can_be_queried_and_nothing_else(shared, tmp_path, canopy):
    root = tmp_path / "s"
    pull(shared, root)
    (tmp_path / "secret.csv").write_text("x\n1\n")
    (root / "link.csv").symlink_to(tmp_path / "secret.csv")
    queries = (
        f"from '{tmp_path / 'secret.csv'}'",
        f"from read_csv('{root}/../secret.csv')",
        "from read_text('/etc/passwd')",
        "from glob('/etc/*')",
        "from read_csv('/dev/stdin')",
        f"copy (select 1) to '{tmp_path / 'out.csv'}'",
        f"attach '{tmp_path / 'new.duckdb'}'",
        "install httpfs",
        "load httpfs",
        "from 'https://example.org/x.parquet'",
        "set enable_external_access = true",
        "reset allowed_directories",
        "set lock_configuration = false",
        "set allowed_directories = ['/']",
        f"export database '{tmp_path / 'out'}'",
        "set extension_directory = '/tmp'",
        "select getenv('HOME')",
    )
    with canopy_store.open(root) as con:
        for query in queries:
            with pytest.raises((duckdb.Error, canopy_store.UsageError)):
                con.execute(query).fetchall()
    for query in queries[::4]:
        code, out, err = canopy("sql", query, "--store", root)
        assert (code, out, len(err.splitlines())) in ((1, "", 1), (2, "", 1)), query
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "secret.csv"]


def test_script_in_a_strangers_text_is_text_in_the_report(tmp_path):
    from canopy_store.report import write_report

    script = "</script><script>hit()</script><img src=x onerror=hit()>"
    pl.DataFrame(
        [
            {
                "family": f"f{script[9:17]}",
                "variant": variant,
                "task": "t",
                "prompt_id": f"{i}{script}",
                "sample": j,
                "entropy": [1.0, 0.5, 0.25][: 1 + (i + j) % 3],
                "text": script,
            }
            for variant in ("base", "sft")
            for i in range(4)
            for j in range(4)
        ]
    ).write_parquet(tmp_path / "in.parquet")
    canopy_store.import_rollouts(tmp_path / "s", tmp_path / "in.parquet", max_new_tokens=9)
    pull(export(tmp_path / "s", tmp_path / "out"), tmp_path / "back")
    page = write_report(tmp_path / "back", tmp_path / "report.html").read_text()
    assert "<script>hit" not in page
    assert "<img src=x" not in page
    assert "<script>hit" not in (tmp_path / "out" / "README.md").read_text()


def test_pickled_weights_that_come_with_a_store_are_not_loaded(shared, tmp_path):
    from canopy_store.ingest.embed import ingest_embeddings

    pull(shared, tmp_path / "s")
    (tmp_path / "embedder").mkdir()
    for name in ("pytorch_model.bin", "model.pkl"):
        (tmp_path / "embedder" / name).write_bytes(b"\x80\x04cos\nsystem\n(S'touch hit'\ntR.")
    with pytest.raises(canopy_store.StoreError, match="pickled weights are not loaded"):
        ingest_embeddings(tmp_path / "s", str(tmp_path / "embedder"))


# ---------------------------------------------------------------- push


def test_a_dry_run_lists_what_would_be_sent(shared, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # a dry run needs no hub
    monkeypatch.setenv("HF_TOKEN", "hf_thisisnotatoken")
    (folder / "notes.txt").write_text("at home")
    sent = push(folder, "someone/rollouts", dry_run=True)
    assert dict(sent) == {
        str(p.relative_to(shared)): p.stat().st_size for p in shared.rglob("*") if p.is_file()
    }
    with pytest.raises(canopy_store.UsageError, match="not the id of a dataset"):
        push(folder, "https://x/y/z", dry_run=True)
    flip(folder / "README.md", 10, 1)
    with pytest.raises(canopy_store.DataError, match=r"README\.md: its sha256"):
        push(folder, "someone/rollouts", dry_run=True)


def test_the_command_line_exports_pulls_and_lists_what_it_would_push(origin, tmp_path, canopy):
    def said(*arguments) -> str:
        code, out, err = canopy(*arguments)
        assert code == 0, err
        return out

    out, where = tmp_path / "out", "task = 'coding'"
    said(
        "export",
        "--store",
        origin,
        "--out",
        out,
        "--tables",
        "rewards,embedding_spectra",
        "--where",
        where,
        "--no-text",
        "--license",
        "cc-by-4.0",
    )
    assert {p.name for p in out.iterdir() if p.is_dir()} == {
        "commits",
        "embedding_spectra",
        "models",
        "plans",
        "prompts",
        "rewards",
        "rollouts",
        "runs",
    }
    assert 'license: "cc-by-4.0"' in (out / "README.md").read_text()
    files = [p for p in out.rglob("*") if p.is_file()]
    size = sum(p.stat().st_size for p in files)
    listed = said("push", out, "someone/rollouts", "--dry-run").splitlines()
    assert sorted(line.split()[1] for line in listed[:-1]) == sorted(
        p.relative_to(out).as_posix() for p in files
    )
    assert listed[-1] == f"would send {len(files)} files, {size:,} bytes, to someone/rollouts"
    runs = canopy_store.read(out, "runs")["run_id"].to_list()
    pulled = said("pull", out, "--store", tmp_path / "s")
    assert pulled == f"{tmp_path / 's'}: {len(runs)} runs from {out}: {', '.join(runs)}\n"
    code, _, err = canopy("push", out, "--dry-run")
    assert code == 2
    assert "USER/NAME" in err


def test_no_token_is_ever_shown(folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_thisisnotatoken")
    with pytest.raises(canopy_store.StoreError, match="push again to resume") as error:
        push(folder, "someone/rollouts")  # the tests are offline
    assert "hf_this" not in str(error.value)
    assert _no_token(ValueError("Bearer abc hf_secret\nx")) == "hf_… hf_… x"
