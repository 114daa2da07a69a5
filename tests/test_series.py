"""A series of checkpoints along a training: its folders, its rows, and stores without its columns."""

from __future__ import annotations

import json
import shutil

import polars as pl
import pyarrow.parquet as pq
import pytest
from chain import CHAIN_LOGITS, save_chain
from stores import ingest_arguments, refused, write_prompts

import canopy_store
from canopy_store import sql, store
from canopy_store.schema import added_columns
from canopy_store.sharing.merge import merge


@pytest.fixture
def runs(tmp_path):
    """A training's folder with three checkpoints, the last by a trainer that counted tokens."""
    for step in (5, 20, 100):
        save_chain(tmp_path / "runs" / f"checkpoint-{step}", CHAIN_LOGITS * (1 + step / 50))
    final = tmp_path / "runs" / "checkpoint-100"
    final.rename(final.with_name("checkpoint-last"))
    state = {"global_step": 100, "num_input_tokens_seen": 6400}
    (tmp_path / "runs" / "checkpoint-last" / "trainer_state.json").write_text(json.dumps(state))
    return tmp_path / "runs"


def arguments(tmp_path, pattern, **more):
    prompts = write_prompts(tmp_path / "prompts.jsonl", "a b", "b a")
    settings = {"variant": "sft", "samples": 6, "max-new-tokens": 12, "treatment": "sft", **more}
    return ingest_arguments(tmp_path / "S", pattern, prompts, **settings)


def test_a_pattern_samples_a_series_and_only_what_is_new(tmp_path, canopy, runs):
    pattern = runs / "checkpoint-*"
    (runs / "checkpoint-20").rename(tmp_path / "later")
    code, out, err = canopy(*arguments(tmp_path, pattern))
    assert code == 0, err
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "S").rglob("part-*.parquet")}
    (tmp_path / "later").rename(runs / "checkpoint-20")
    code, out, err = canopy(*arguments(tmp_path, pattern))
    assert code == 0, err
    assert [line.split()[2] for line in out.splitlines()] == [
        f"chain.sft@{step}.walk" for step in (5, 20, 100)
    ]
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    models = sql.read(tmp_path / "S", "models").sort("step")
    assert models.select("variant", "series", "treatment", "step", "tokens_seen").rows() == [
        ("sft@5", "sft", "sft", 5, None),
        ("sft@20", "sft", "sft", 20, None),
        ("sft@100", "sft", "sft", 100, 6400),
    ]
    metrics = sql.read(tmp_path / "S", "model_metrics").sort("variant")
    assert metrics["ce_star"].n_unique() == 3
    # as one checkpoint alone has it: the series adds nothing to what is drawn
    root = tmp_path / "alone"
    of = {"store": root, "variant": "sft@20"}
    assert canopy(*arguments(tmp_path, runs / "checkpoint-20", **of))[0] == 0
    one, other = (
        sql.read(path, "rollouts").filter(variant="sft@20").sort("prompt_id", "sample")
        for path in (tmp_path / "S", root)
    )
    assert one.equals(other)
    code, out, err = canopy(
        "compare", "--store", tmp_path / "S", "--baseline", "sft@5", "--format", "csv"
    )
    assert code == 0, err
    variants = pl.read_csv(out.encode())["variant"].unique(maintain_order=True).to_list()
    assert variants == ["sft@20", "sft@100"]
    assert canopy("verify", "--store", tmp_path / "S")[0] == 0


def test_what_is_no_series_is_refused_in_one_line(tmp_path, canopy, runs):
    refused(canopy(*arguments(tmp_path, runs / "chekpoint-*")), 1, "chekpoint-*", "no folder matches")
    shutil.copytree(runs / "checkpoint-5", runs / "checkpoint-5-copy-5")
    refused(canopy(*arguments(tmp_path, runs / "*")), 1, "both of step 5", "checkpoint-5-copy-5")
    shutil.rmtree(runs / "checkpoint-5-copy-5")
    (runs / "checkpoint-last" / "trainer_state.json").write_text("[]")
    refused(canopy(*arguments(tmp_path, runs / "*")), 1, "trainer_state.json", "no JSON object")
    (runs / "checkpoint-last" / "trainer_state.json").unlink()
    refused(canopy(*arguments(tmp_path, runs / "*")), 1, "checkpoint-last: tells no step")
    for file in (runs / "checkpoint-5").glob("*.safetensors"):
        file.unlink()
    refused(canopy(*arguments(tmp_path, runs / "checkpoint-?")), 1, "checkpoint-5: no *.safetensors")
    assert not (tmp_path / "S").exists()


def without_columns(root):
    """The store as it was before a series had columns: its files lack them."""
    for record in store.records(root):
        if record.kind == "models":
            (name,) = record.files
            table = pq.read_table(root / name, partitioning=None)
            store.write_table(root / name, "models", table.drop_columns(added_columns("models")))
            store.commit(root, "models", record.keys, [root / name], {})
    sql.write_database(root)


def test_a_store_without_the_columns_opens_grows_and_merges(tmp_path, canopy, runs):
    old, new = tmp_path / "old", tmp_path / "new"
    for root in (old, new):
        args = arguments(tmp_path, runs / "checkpoint-[25]*", store=root)
        assert canopy(*args)[0] == 0
    without_columns(old)
    assert sql.read(old, "models").select("series", "step").rows() == [(None, None)] * 2
    assert canopy("verify", "--store", old)[0] == 0
    # the same ingest is in no conflict with what could not be said then; and one more step is said
    code, _, err = canopy(*arguments(tmp_path, runs / "checkpoint-*", store=old))
    assert code == 0, err
    assert sql.read(old, "models").sort("variant")["step"].to_list() == [100, None, None]
    for source, target in ((old, tmp_path / "a"), (new, tmp_path / "a"), (new, old)):
        merge([source], target)
        assert canopy("verify", "--store", target)[0] == 0
    with canopy_store.open(tmp_path / "a") as opened:
        assert len(opened.sql("from models").fetchall()) == 3


def test_register_keeps_the_step(tmp_path, canopy, runs):
    root, folder = tmp_path / "S", runs / "checkpoint-last"
    args = ["ingest", "register", "--store", root, "--model", folder, "--family", "f", "--variant", "v"]
    for _ in range(2):
        assert canopy(*args)[0] == 0
    assert sql.read(root, "models").select("series", "step", "tokens_seen").rows() == [(None, 100, 6400)]
