"""What a policy's cuts took away: against the chain's logits in float64, and in files old and new."""

from __future__ import annotations

import json
import shutil

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from chain import CHAIN_LOGITS
from stores import enter, ingest_arguments, shell, write_prompts

import canopy_store
from canopy_store import sql, store
from canopy_store.cli import main
from canopy_store.schema import TABLES
from canopy_store.upkeep.compact import compact
from canopy_store.upkeep.verify import verify

POLICY = {"temperature": 0.7, "top-k": 5, "top-p": 0.8}
CUTS = TABLES["rollouts"].optional


@pytest.fixture(scope="module")
def cut(tmp_path_factory, chain):
    """A run that cuts, scored by its own model; and one of another task that does not."""
    folder = tmp_path_factory.mktemp("cuts")
    prompts = write_prompts(folder / "p.jsonl", "b a", "c d", "e f")
    root = folder / "s"
    small = {"samples": 8, "max-new-tokens": 12}
    assert main(ingest_arguments(root, chain, prompts, **small, **POLICY)) == 0
    assert main(ingest_arguments(root, chain, prompts, **small, task="whole")) == 0
    from canopy_store.ingest.score import ingest_scores

    ingest_scores(root, str(chain))
    return root


def kept_by_hand(row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tempered log-probabilities (V,) of a step, and which tokens top-k and then top-p keep."""
    plain = row / POLICY["temperature"]
    plain = plain - np.log(np.exp(plain).sum())
    order = np.argsort(-plain, kind="stable")[: POLICY["top-k"]]
    mass = np.exp(plain[order]) / np.exp(plain[order]).sum()
    kept = order[np.cumsum(mass) - mass < POLICY["top-p"]]
    return plain, kept


@pytest.mark.parametrize("table", ["rollouts", "scores"])
def test_what_was_cut_and_the_plain_models_probability_are_exact(cut, table):
    frame = canopy_store.read(cut, table).filter(pl.col("run_id") == "chain.base.walk")
    ids = canopy_store.read(cut, "rollouts").select("run_id", "prompt_id", "sample", "token_ids")
    columns = [name for name in frame.columns if name != "token_ids"]
    frame = frame.select(columns).join(ids, on=["run_id", "prompt_id", "sample"])
    last = {p: {"b a": 1, "c d": 4, "e f": 6}[row["text"]] for (_, p), row in sql.prompts(cut).items()}
    cutting = 0
    for row in frame.to_dicts():
        before = [last[row["prompt_id"]], *row["token_ids"][:-1]]
        assert len(row["log_mass"]) == len(row["n_kept"]) == len(row["token_ids"])
        assert row["log_mass_sum"] == pytest.approx(np.sum(np.array(row["log_mass"])), abs=1e-9)
        for state, token, logprob, mass, kept in zip(
            before, row["token_ids"], row["logprob"], row["log_mass"], row["n_kept"], strict=True
        ):
            plain, chosen = kept_by_hand(CHAIN_LOGITS[state])
            assert kept == len(chosen)
            assert mass == pytest.approx(np.log(np.exp(plain[chosen]).sum()), abs=2e-6)
            assert logprob + mass == pytest.approx(plain[token], abs=4e-6)
            cutting += mass < -0.05
    assert cutting > 50


def test_the_measures_are_of_what_was_cut_and_compare_takes_them(cut):
    rows = canopy_store.read(cut, "rollout_metrics")
    steps = canopy_store.read(cut, "rollouts").select("run_id", "prompt_id", "sample", "log_mass")
    both = rows.join(steps, on=["run_id", "prompt_id", "sample"])
    for row in both.to_dicts():
        want = None if row["log_mass"] is None else pytest.approx(np.mean(row["log_mass"]), abs=1e-7)
        assert row["log_mass_mean"] == want
    runs = {row["task"]: row for row in canopy_store.read(cut, "model_metrics").to_dicts()}
    assert runs["whole"]["mass_cut"] is None
    assert 0.05 < runs["walk"]["mass_cut"] < 0.5
    from canopy_store.analysis.bootstrap import MEASURES

    assert MEASURES["mass_cut"].out(np.array(runs["walk"]["log_mass_mean"])) == pytest.approx(
        runs["walk"]["mass_cut"], abs=1e-12
    )
    with canopy_store.open(cut) as con:
        at = con.sql("select avg(log_mass_sum) from selected_rollouts_at(1) where task = 'walk'")
        want = steps.filter(pl.col("log_mass").is_not_null())["log_mass"].list.first().mean()
        assert at.fetchall()[0][0] == pytest.approx(want, abs=1e-7)


def test_only_files_that_have_something_cut_have_the_columns(cut):
    for record in store.records(cut, "rollouts"):
        cutting = record.run == "chain.base.walk"
        for name in record.of("rollouts"):
            assert (pq.read_schema(cut / name).names[-3:] == list(CUTS)) == cutting
            assert record.files[name].get("optional") == (list(CUTS) if cutting else None)


@pytest.fixture
def mixed(cut, tmp_path):
    """The same store, of which one shard was written before there were such columns."""
    root = shutil.copytree(cut, tmp_path / "s")
    (first, *_) = [p for p in store.files(root, "rollouts") if "task=walk" in str(p)]
    rows = store.read_rows(first)
    values = {n: rows[n] for n in rows.column_names if n not in CUTS}
    store.write_rows(first, "rollouts", values)
    enter(root, first)
    return root


def test_files_written_before_stand_beside_new_ones(mixed, tmp_path):
    assert verify(mixed, deep=True)["harmless"].all()
    frame = canopy_store.read(mixed, "rollouts").filter(pl.col("task") == "walk")
    assert frame["log_mass"].null_count() == 8
    assert len(frame) == 24
    # its scores, under the run's own policy, complete only what a run lacks that logged less
    assert canopy_store.read(mixed, "prompt_metrics")["mass_cut"].null_count() == 1 + 3
    sql.write_database(mixed)
    assert shell(mixed, "select count(log_mass) as n from rollouts") == [{"n": 16}]
    with canopy_store.open(mixed) as con:
        other = con.cursor()  # has lists of files of its own
        assert other.sql("select count(log_mass_sum) from selected_rollouts").fetchall() == [(16,)]
    canopy_store.export(mixed, tmp_path / "out")
    canopy_store.merge([tmp_path / "out"], tmp_path / "more")
    assert canopy_store.read(tmp_path / "more", "rollouts")["n_kept"].null_count() == 8 + 24
    before = frame.sort("prompt_id", "sample")
    assert compact(mixed, ["chain.base.walk"]) == {"chain.base.walk": (3, 1)}
    after = canopy_store.read(mixed, "rollouts").filter(pl.col("task") == "walk")
    assert after.sort("prompt_id", "sample").equals(before)
    assert verify(mixed, deep=True)["harmless"].all()


def test_a_record_that_names_other_columns_than_its_file_has_is_found(mixed):
    path = mixed / "commits" / "rollouts" / "run=chain.base.walk.json"
    record = json.loads(path.read_text())
    entry = next(e for n, e in record["files"].items() if n.startswith("rollouts") and "optional" in e)
    entry["optional"] = ["log_mass"]
    path.write_text(json.dumps(record))
    assert "its record says otherwise" in "".join(verify(mixed)["what"])
    entry["optional"] = ["text"]
    path.write_text(json.dumps(record))
    assert "not a readable record" in "".join(verify(mixed)["what"])


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("log_mass", [0.5], "log_mass at step 1 is 0.5: the log of a kept mass"),
        ("n_kept", [0], "n_kept at step 1 is 0"),
        ("log_mass", [-0.5, -0.5], "log_mass and entropy differ in length"),
    ],
)
def test_what_no_cut_can_be_is_refused_at_import(tmp_path, column, value, said):
    row = {"family": "f", "variant": "v", "task": "t", "prompt_id": "p", "sample": 0, "entropy": [0.5]}
    pl.DataFrame([{**row, column: value}]).write_parquet(tmp_path / "in.parquet")
    with pytest.raises(canopy_store.DataError, match=said):
        canopy_store.import_rollouts(tmp_path / "s", tmp_path / "in.parquet")
