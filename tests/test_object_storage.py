"""A store at s3://… is the store a folder would be: same values, same promises, same one-line refusals.

Against moto's S3 server on a loopback port; what it holds outlives a stop of the server.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path

import boto3
import duckdb
import numpy as np
import polars as pl
import pytest
from moto.server import ThreadedMotoServer
from polars.testing import assert_frame_equal
from stores import OF_MEANINGS, OF_TEXTS, rollouts, write_prompts

import canopy_store
from canopy_store import sql, store
from canopy_store.errors import DataError, StoreError, UsageError
from canopy_store.schema import TABLES

SECRET = "not-to-be-shown"


class Server:
    """The S3 server, and the count of what it was asked: (method, listing or object)."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        handler = logging.Handler()
        handler.emit = self._count  # type: ignore[method-assign]
        log = logging.getLogger("werkzeug")
        log.setLevel(logging.INFO)
        log.handlers, log.propagate = [handler], False
        self.port = 0
        self.start()

    def start(self) -> None:
        self.moto = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self.moto.start()
        self.port = self.moto.get_host_and_port()[1]

    def stop(self) -> None:
        self.moto.stop()

    def _count(self, record: logging.LogRecord) -> None:
        method = next((m for m in ("GET", "HEAD", "PUT", "POST") if f"{m} /" in record.getMessage()), "")
        self.asked["list" if "list-type" in record.getMessage() else method] += 1

    def keys(self, bucket: str) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return [item["Key"] for page in pages for item in page.get("Contents", ())]

    @functools.cached_property
    def client(self):
        return boto3.client("s3", endpoint_url=f"http://127.0.0.1:{self.port}")


@pytest.fixture(scope="module")
def server():
    patch = pytest.MonkeyPatch()
    patch.setenv("AWS_ACCESS_KEY_ID", "AKIATEST")
    patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    started = Server()
    patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{started.port}")
    yield started
    started.stop()
    patch.undo()


@pytest.fixture
def bucket(server, request) -> str:
    """The name of an empty bucket."""
    name = f"b{abs(hash(request.node.name)) % 10**12}"
    server.client.create_bucket(Bucket=name)
    return name


def ingest(root: object, model: Path, prompts: Path, **more: object) -> list[str]:
    settings = {
        "store": root,
        "model": model,
        "family": "chain",
        "variant": "base",
        "task": "walk",
        "prompts": prompts,
        "samples": 8,
        "max-new-tokens": 40,
        "seed": 5,
        "prompts-per-shard": 1,
        **more,
    }
    return ["ingest", "rollouts", *(x for k, v in settings.items() for x in (f"--{k}", str(v)))]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "canopy_store.cli", *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def is_shard(key: str) -> bool:
    return "/rollouts/" in key and key.endswith(".parquet")


def wait_for_shards(server: Server, bucket: str, count: int) -> None:
    deadline = time.monotonic() + 120
    while sum(is_shard(key) for key in server.keys(bucket)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def many_prompts(path: Path, count: int = 60) -> Path:
    texts = [f"{a} {b} {c}" for a in "abcdefg" for b in "abcdef" for c in "abc"]
    return write_prompts(path, *texts[:count])


@pytest.fixture
def prompts(tmp_path) -> Path:
    return write_prompts(tmp_path / "p.jsonl", "a b", "c", "d e")


def mine(path: Path) -> Path:
    """Rollouts to import: two variants with embeddings and rewards."""
    random = np.random.default_rng(3)
    lengths = random.integers(2, 9, 48)
    pl.DataFrame(
        {
            "family": "mine",
            "variant": ["base", "sft"] * 24,
            "task": "walk",
            "prompt_id": [f"p{i // 16}" for i in range(48)],
            "sample": [i % 16 // 2 for i in range(48)],
            "entropy": [random.uniform(0, 2, n).tolist() for n in lengths],
            "embedding": random.normal(size=(48, 5)).tolist(),
            "reward": random.normal(size=48),
            "score": random.uniform(size=48),
            "correct": [i % 3 == 0 for i in range(48)],
        }
    ).write_parquet(path)
    return path


def test_every_view_is_that_of_the_same_store_in_a_folder(tmp_path, chain, prompts, bucket, canopy):
    file = mine(tmp_path / "mine.parquet")
    local, there = tmp_path / "s", f"s3://{bucket}/some where/s"
    for root in (local, there):
        for arguments in (
            ["init", "--store", root],
            ingest(root, chain, prompts),
            ["ingest", "score", "--store", root, "--scorer", chain, "--temperature", "2"],
            ["import", file, "--store", root, "--max-new-tokens", "8"],
            ["import", file, "--store", root, "--max-new-tokens", "8"],
            [
                "select",
                "lengths",
                "--store",
                root,
                "--caliper",
                "0.5",
                "--run",
                "mine.base.walk",
                "--run",
                "mine.sft.walk",
            ],
            ["select", "reward", "--store", root, "--keep", "0.5"],
        ):
            code, _, err = canopy(*arguments)
            assert code == 0, (arguments, err)
    timed = ("started_at", "finished_at", "wall_s", "seconds", "tokens_per_second")
    with canopy_store.open(str(local)) as a, canopy_store.open(there) as b:
        for relation in (*TABLES, *sql.VIEWS):
            here, away = (con.sql(f"from {relation}").pl() for con in (a, b))
            here, away = (f.drop(timed, strict=False) for f in (here, away))
            if relation != "eos_trajectory" and relation not in OF_TEXTS | OF_MEANINGS:
                assert len(here), relation
            assert_frame_equal(here, away, check_row_order=False, rel_tol=1e-12)
    shown = [
        canopy(
            "compare",
            "--store",
            root,
            "--metric",
            "ce_star",
            "--run",
            "mine.base.walk",
            "--run",
            "mine.sft.walk",
            "--replicates",
            "50",
            "--format",
            "json",
        )
        for root in (local, there)
    ]
    assert shown[0][0] == 0
    assert shown[0] == shown[1]
    status = [canopy_store.status(str(root)).drop("bytes") for root in (local, there)]
    assert_frame_equal(*status)


def test_files_are_those_of_a_folder_and_no_temporary_name_appears(
    tmp_path, chain, prompts, bucket, server, canopy
):
    for root in (tmp_path / "s", f"s3://{bucket}/s"):
        assert canopy(*ingest(root, chain, prompts))[0] == 0
    (tmp_path / "s" / "canopy.duckdb").unlink()
    local = [p.relative_to(tmp_path) for p in (tmp_path / "s").rglob("*") if p.is_file()]
    assert server.keys(bucket) == sorted(p.as_posix() for p in local if p.suffix != ".lock")


def test_killed_again_and_again_a_run_equals_one_in_a_folder(tmp_path, chain, bucket, server, canopy):
    prompts = many_prompts(tmp_path / "p.jsonl")
    there = f"s3://{bucket}/s"
    for shards in (3, 20):
        process = start(ingest(there, chain, prompts))
        wait_for_shards(server, bucket, shards)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert len(canopy_store.read(there, "rollouts")) == 0  # incomplete
    stored = server.keys(bucket)
    assert 20 <= sum(map(is_shard, stored)) < 60
    assert not [key for key in stored if not key.endswith((".parquet", ".json"))]
    server.asked.clear()
    assert canopy(*ingest(there, chain, prompts))[0] == 0
    assert server.asked["PUT"] <= 2 * (60 - 20) + 5  # what was missing with its notes, and the commit
    assert canopy(*ingest(tmp_path / "s", chain, prompts))[0] == 0
    assert rollouts(there).equals(rollouts(tmp_path / "s"))


def test_two_writers_of_one_run_do_not_disturb_each_other(tmp_path, chain, bucket, canopy):
    prompts = many_prompts(tmp_path / "p.jsonl", 30)
    there = f"s3://{bucket}/s"
    writers = [start(ingest(there, chain, prompts)) for _ in range(2)]
    for writer in writers:
        _, err = writer.communicate(timeout=300)
        assert writer.returncode == 0, err
    assert canopy(*ingest(tmp_path / "s", chain, prompts))[0] == 0
    assert rollouts(there).equals(rollouts(tmp_path / "s"))


def test_a_server_that_goes_away_is_one_line_and_the_resume_finishes(
    tmp_path, chain, bucket, server, canopy
):
    prompts = many_prompts(tmp_path / "p.jsonl")
    there = f"s3://{bucket}/s"
    process = start(ingest(there, chain, prompts))
    wait_for_shards(server, bucket, 3)
    server.stop()
    _, err = process.communicate(timeout=120)
    reading = canopy("status", "--store", there)
    server.start()
    assert process.returncode == 1
    assert len(err.strip().splitlines()) == 1
    assert err.startswith(f"canopy: s3://{bucket}/s/")
    assert "nothing stored is lost" in err
    assert SECRET not in err
    assert reading[0] == 1
    assert reading[2].startswith(f"canopy: {there}")
    assert len(reading[2].strip().splitlines()) == 1
    assert canopy(*ingest(there, chain, prompts))[0] == 0
    assert canopy(*ingest(tmp_path / "s", chain, prompts))[0] == 0
    assert rollouts(there).equals(rollouts(tmp_path / "s"))


def test_a_put_is_whole_or_not_at_all(bucket, server):
    root = store.init(f"s3://{bucket}/s")
    path = root / "rollouts" / "file"
    contents = [bytes([i]) * (1 << 18) for i in range(8)]
    with store.replacing(path) as file:
        file.write(contents[0])
        assert not path.exists()

    def fail() -> None:
        with store.replacing(path) as file:
            file.write(b"half")
            assert path.read_bytes() == contents[0]
            assert len(server.keys(bucket)) == 2  # and canopy.json: no temporary name
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_bytes() == contents[0]
    seen: list[bytes] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.append(store.read_bytes(path))

    reader = threading.Thread(target=read)
    reader.start()
    for content in contents:
        with store.replacing(path) as file:
            file.write(content)
    done.set()
    reader.join()
    assert len(seen) > 4
    assert set(seen) <= set(contents)
    assert path.read_bytes() == contents[-1]


def test_a_shard_in_parts_is_put_whole(bucket, server):
    """Above 100 MB the client puts in parts: nothing shows before the last."""
    root = store.init(f"s3://{bucket}/s")
    path = root / "large"
    server.asked.clear()
    with store.replacing(path) as file:
        for _ in range(101):
            file.write(b"x" * (1 << 20))
    assert server.asked["POST"] == 2  # begin and complete
    assert path.stat().st_size == 101 << 20


def test_a_query_reads_the_store_and_nothing_else(tmp_path, chain, prompts, bucket, server, canopy):
    there = f"s3://{bucket}/s"
    assert canopy(*ingest(there, chain, prompts))[0] == 0
    secret = tmp_path / "secret.csv"
    secret.write_text("a\n1\n")
    server.client.put_object(Bucket=bucket, Key="s2/secret.csv", Body=b"a\n1\n")
    server.client.put_object(Bucket=bucket, Key="secret.csv", Body=b"a\n1\n")
    server.client.create_bucket(Bucket=f"{bucket}other")
    server.client.put_object(Bucket=f"{bucket}other", Key="secret.csv", Body=b"a\n1\n")
    with canopy_store.open(there) as con:
        assert con.sql(f"select count(*) from '{there}/rollouts/**/*.parquet'").fetchall() == [(24,)]
        for place in (
            secret,
            f"file://{secret}",
            f"s3://{bucket}/s2/secret.csv",
            f"s3://{bucket}/secret.csv",
            f"s3://{bucket}/s/../secret.csv",
            f"s3://{bucket}/s/rollouts/../../s2/*.csv",
            f"s3://{bucket}*/secret.csv",
            f"s3a://{bucket}/secret.csv",
            f"s3://{bucket}other/secret.csv",
        ):
            for query in (
                f"from '{place}'",
                f"from read_text('{place}')",
                f"from glob('{place}')",
                f"copy (select 1) to '{place}' (format csv)",
                f"attach '{place}'",
            ):
                found: object = []
                with contextlib.suppress(duckdb.Error, UsageError):
                    relation = con.sql(query)
                    found = "attached" if relation is None else relation.fetchall()
                assert found == [], query
        for setting in ("enable_external_access = true", "allowed_directories = ['/']"):
            with pytest.raises(UsageError, match="a query only reads"):
                con.execute(f"set {setting}")
    assert len(server.keys(f"{bucket}other")) == 1


def test_a_hundred_shards_open_with_one_request_each(tmp_path, chain, bucket, server, canopy):
    prompts = many_prompts(tmp_path / "p.jsonl", 100)
    there = f"s3://{bucket}/s"
    assert canopy(*ingest(there, chain, prompts, samples=2))[0] == 0
    server.asked.clear()
    with canopy_store.open(there) as con:
        opening = dict(server.asked)
        server.asked.clear()
        assert con.sql("select sum(n_rollouts) from prompt_metrics").fetchall() == [(200,)]
        con.sql("from model_metrics").fetchall()
    assert opening["GET"] <= 16, opening  # the version, three records, a footer a table
    assert opening["list"] + opening["HEAD"] <= 6, opening
    assert sum(server.asked.values()) <= 2 * 103, server.asked
    server.asked.clear()
    assert canopy(*ingest(there, chain, prompts, samples=2))[0] == 0  # nothing left to do
    assert sum(server.asked.values()) < 50, server.asked


def test_a_file_replaced_under_an_open_connection_is_never_mixed(chain, prompts, bucket, canopy):
    there = f"s3://{bucket}/s"
    assert canopy(*ingest(there, chain, prompts))[0] == 0
    before = rollouts(there)
    with canopy_store.open(there) as con:
        path = store.files(store.require(there), "rollouts")[0]
        rows = store.read_rows(path)
        names = rows.schema.names
        other = {n: rows[n].take(list(range(rows.num_rows))[::-1]) for n in names if n != "sample"}
        store.write_rows(path, "rollouts", {**other, "sample": rows["sample"]})
        seen = before
        with contextlib.suppress(duckdb.Error):  # or what was kept of the old one
            seen = con.sql("from rollouts").pl().sort("run_id", "prompt_id", "sample")
        assert seen.equals(before)
    assert not rollouts(there).equals(before)
    file = store.opened(path)
    store.write_rows(path, "rollouts", {name: rows[name] for name in names})
    with pytest.raises(StoreError, match="run it again"), store.reaching(path):
        file.read()


def test_a_server_that_goes_away_under_a_query_is_one_line(chain, prompts, bucket, server, canopy):
    there = f"s3://{bucket}/s"
    assert canopy(*ingest(there, chain, prompts))[0] == 0
    server.client.put_object(Bucket=bucket, Key="s/more.csv", Body=b"a\n1\n")
    with canopy_store.open(there) as con:
        server.stop()
        try:
            with pytest.raises(duckdb.Error) as caught:
                con.sql(f"from '{there}/more.csv'").fetchall()
        finally:
            server.start()
        told = str(sql.explain(caught.value))
        assert "run it again" in told
        assert "Traceback" not in told
        assert "\n" not in told
        assert SECRET not in told


# ---------------------------------------------------------------- refusals


def one_line(answer: tuple[int, str, str], code: int, *words: str) -> None:
    assert answer[0] == code, answer
    assert len(answer[2].strip().splitlines()) == 1, answer[2]
    for word in words:
        assert word in answer[2]
    assert SECRET not in answer[2]


def test_a_store_that_is_not_there(bucket, server, canopy):
    one_line(canopy("status", "--store", f"s3://{bucket}/s"), 1, "no store here", "canopy init")
    one_line(canopy("status", "--store", "s3://no-such-bucket/s"), 1, "no store here")
    one_line(canopy("init", "--store", "s3://no-such-bucket/s"), 1, "make the bucket")
    assert "no-such-bucket" not in [b["Name"] for b in server.client.list_buckets()["Buckets"]]
    server.client.put_object(Bucket=bucket, Key="s/other.txt", Body=b"")
    one_line(canopy("init", "--store", f"s3://{bucket}/s"), 1, "not a store")


@pytest.mark.parametrize(
    "place", ["s3://", "s3:///x", "s3://b/../c", "s3://b//c", "s3://b/c?x=1", "http://b/c", "file:///b"]
)
def test_a_place_that_is_no_store(place, canopy):
    one_line(canopy("init", "--store", place), 2, place)


def test_a_damaged_file(tmp_path, chain, prompts, bucket, server, canopy):
    there = f"s3://{bucket}/s"
    assert canopy(*ingest(there, chain, prompts))[0] == 0
    path = store.files(store.require(there), "rollouts")[1]
    whole = path.read_bytes()
    for damaged in (whole[:-20], b"", b"PAR1" + b"\xff" * 40 + b"PAR1"):
        path.write_bytes(damaged)
        one_line(canopy("sql", "from rollouts", "--store", there), 1, str(path))
        assert canopy("status", "--store", there)[0] == 0  # which opens no shard
        said = canopy("verify", "--store", there, "--json")[1]
        assert path.relative_to(store.locate(there)).as_posix() in said
    with pytest.raises(DataError, match="truncated"):
        store.check_file(path)


def test_refused_access(bucket, server, canopy):
    there = f"s3://{bucket}/s"
    store.init(there)

    def let(count: str) -> None:
        url = f"http://127.0.0.1:{server.port}/moto-api/reset-auth"
        plain = {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(url, count.encode(), plain, method="POST"))

    let("0")
    try:
        one_line(canopy("status", "--store", there), 1, "access refused", "credentials")
        one_line(canopy("init", "--store", f"s3://{bucket}/t"), 1, "access refused")
        with pytest.raises(StoreError, match="access refused"):
            store.runs(store.locate(there))
    finally:
        let("inf")


def test_without_credentials(tmp_path, bucket, server):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    environment |= {
        "AWS_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"],
        "HOME": str(tmp_path),
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    command = [sys.executable, "-m", "canopy_store.cli", "init", "--store", f"s3://{bucket}/s"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    one_line((done.returncode, done.stdout, done.stderr), 1, "no credentials", "AWS_ACCESS_KEY_ID")


@pytest.mark.parametrize(("place", "package"), [("s3://b/s", "s3fs"), ("gs://b/s", "gcsfs")])
def test_a_missing_package_is_named(place, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=r"pip install 'canopy-store\[s3\]'") as caught:
        store.require(place)
    assert package in str(caught.value)


def test_a_folder_needs_no_client(tmp_path):
    code = (
        "import sys, canopy_store; canopy_store.store.init(sys.argv[1]); "
        "print([m for m in ('upath', 's3fs', 'fsspec') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert json.loads(done.stdout) == []


def test_verify_export_and_pull(tmp_path, chain, prompts, bucket, server, canopy):
    there, away = f"s3://{bucket}/s", f"s3://{bucket}/t"
    file = mine(tmp_path / "mine.parquet")
    assert canopy(*ingest(there, chain, prompts))[0] == 0
    assert canopy("import", file, "--store", there)[0] == 0
    code, out, err = canopy("verify", "--store", there, "--deep")
    assert code == 0, out + err
    code, out, err = canopy("export", "--store", there, "--out", tmp_path / "shared")
    assert code == 0, err
    code, out, err = canopy("pull", tmp_path / "shared", "--store", away)
    assert code == 0, err
    assert rollouts(away).equals(rollouts(there))
    assert canopy("verify", "--store", away)[0] == 0
    assert canopy("pull", tmp_path / "shared", "--store", away)[0] == 0
    path = store.files(store.require(there), "embedding_spectra")[0]
    rows = store.read_rows(path)
    wrong = {name: rows[name] for name in rows.schema.names}
    wrong["embedding_sum"] = [[x + 1 for x in row] for row in rows["embedding_sum"].to_pylist()]
    store.write_rows(path, "embedding_spectra", wrong)
    code, out, _ = canopy("verify", "--store", there, "--deep", "--format", "json")
    assert code == 1
    assert path.relative_to(store.locate(there)).as_posix() in out


def test_upkeep_needs_to_be_told_that_no_other_job_uses_the_store(tmp_path, bucket, server, canopy):
    """There are no locks: upgraded, compacted and rid of a run only with --without-locks."""
    old, there = Path(__file__).parent / "data" / "format1" / "sampled", f"s3://{bucket}/s"
    for path in old.rglob("*"):
        if path.is_file():
            server.client.upload_file(str(path), bucket, f"s/{path.relative_to(old).as_posix()}")
    before = rollouts(there)
    for command, said in (
        (["upgrade"], "a store of format 2: 34 files rewritten"),
        (["compact"], "chain.base.walk: 4 shards are now 1"),
        (["rm-run", "chain.base.walk", "--yes"], "chain.base.walk removed"),
    ):
        code, _, err = canopy(*command, "--store", there)
        assert (code, "no locks can be had here" in err) == (1, True), err
        assert_frame_equal(rollouts(there), before)
        code, out, err = canopy(*command, "--store", there, "--without-locks")
        assert (code, said in out) == (0, True), (out, err)
    assert rollouts(there).is_empty()
    left = server.keys(bucket)
    assert not [key for key in left if "chain.base.walk" in key]
    assert [key for key in left if "chain.base.half" in key]
