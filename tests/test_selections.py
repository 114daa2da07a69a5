"""Selections: which rollouts they keep, that every view carries them, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import reference
from polars.testing import assert_frame_equal
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from stops import interleaved
from stores import GOLDEN_ROLLOUTS, enter, import_golden, rewrite, rollout_rows, views, write_parquet

import canopy_store
from canopy_store import ConflictError, DataError, UsageError
from canopy_store import store as stored
from canopy_store.upkeep.verify import verify


@pytest.fixture
def store(tmp_path):
    """Makes a store of these rows."""

    def make(rows):
        root = tmp_path / "s"
        canopy_store.import_rollouts(
            root, write_parquet(tmp_path / "in.parquet", rows), max_new_tokens=64
        )
        return root

    return make


@pytest.mark.parametrize(
    ("keep", "kept"),
    [(0.2, {1}), (0.21, {0, 1}), (0.6, {0, 1, 3}), (1, {0, 1, 2, 3, 4}), (0.7, {0, 1, 2, 3})],
)
def test_the_best_are_kept_and_ties_go_to_the_lower_sample(store, keep, kept):
    root = store(rollout_rows(reward=[0.5, 0.9, 0.1, 0.5, 0.1]))
    name = canopy_store.select_reward(root, keep)
    frame = canopy_store.read(root, "rollout_metrics").filter(selection=name)
    assert set(frame["sample"]) == kept


def test_rounding_does_not_keep_one_more(store):
    rng = np.random.default_rng(0)
    root = store(rollout_rows(lengths=[3] * 40, reward=rng.normal(size=40)))
    frame = canopy_store.read(root, "selections")
    assert frame.is_empty()
    canopy_store.select_reward(root, 0.7)
    assert len(canopy_store.read(root, "selections")) == 28  # 0.7 * 40 is 28.000000000000004


def test_every_view_carries_the_selection_as_if_it_were_all(tmp_path):
    """A store of the chosen rollouts alone says the same of them."""
    root, alone = tmp_path / "s", tmp_path / "alone"
    every = pl.read_parquet(GOLDEN_ROLLOUTS).with_columns(
        pl.col("entropy").list.eval(-1.3 * pl.element()).alias("logprob"),
        pl.col("entropy").list.eval(-0.1 - pl.element()).alias("eos_logprob"),
        correct=pl.col("sample") % 3 == 0,
    )
    canopy_store.import_rollouts(root, write_parquet(tmp_path / "all.parquet", every), max_new_tokens=64)
    canopy_store.select_reward(root, 0.3, name="few")
    chosen = canopy_store.read(root, "selections").select("run_id", "prompt_id", "sample")
    rows = every.with_columns(
        pl.concat_str("family", "variant", "task", separator=".").alias("run_id"),
        pl.col("prompt_id").cast(pl.String).alias("key"),
        pl.col("sample").cast(pl.Int32).alias("number"),
    )
    rows = rows.join(
        chosen,
        left_on=["run_id", "key", "number"],
        right_on=["run_id", "prompt_id", "sample"],
        how="semi",
    )
    rows = rows.drop("run_id", "key", "number")
    write_parquet(tmp_path / "in.parquet", rows)
    canopy_store.import_rollouts(alone, tmp_path / "in.parquet", max_new_tokens=64)
    of_all, of_chosen = views(root), views(alone)
    for view, frame in of_all.items():
        if view in ("scored_rollouts", "cross_entropy", "kl_divergence", "kl_trajectory"):
            continue  # nothing here is scored; tests/test_score.py has them
        if "selection" not in frame.columns:
            continue  # of documents and items
        found = frame.filter(selection="few").drop("selection")
        expected = of_chosen[view].drop("selection")
        keys = canopy_store.sql.source(view).splitlines()[1].removeprefix("-- keys: ").split(", ")
        keys.remove("selection")
        assert len(expected)
        assert_frame_equal(found.sort(keys), expected.sort(keys), rel_tol=1e-9, abs_tol=1e-9)


def test_later_runs_and_later_embeddings_are_taken_up(store, tmp_path):
    from canopy_store.store import commit
    from canopy_store.store.embeddings import write_embeddings

    rewards = [0.1, 0.2, 0.3, 0.4, 0.5]
    root = store(rollout_rows(reward=rewards))
    canopy_store.select_reward(root, 0.6)
    later = write_parquet(tmp_path / "later.parquet", rollout_rows("sft", reward=rewards))
    canopy_store.import_rollouts(root, later, max_new_tokens=64)
    vectors = np.random.default_rng(0).normal(size=(5, 4))
    for run in ("f.base.t", "f.sft.t"):
        files = write_embeddings(root, "e", run, 0, ["p"] * 5, list(range(5)), vectors)
        commit(root, "embeddings", {"embedder": "e", "run": run}, files, {})
    canopy_store.select_reward(root, 0.6)
    frame = canopy_store.read(root, "prompt_metrics").filter(selection="reward_top_60")
    expected = reference.prompt_metrics(
        [{"entropy": [1.0]}] * 3, reference.unit_embeddings(vectors[2:].tolist())
    )
    assert frame["n_rollouts"].to_list() == [3, 3]
    for name in ("semantic_diversity", "vendi_score"):
        assert frame[name].to_list() == pytest.approx([expected[name]] * 2, abs=1e-9)


def test_a_selection_made_anew_beside_an_embedder_that_comes_to_it(store, tmp_path):
    """Whichever is first at whichever write, the spectra are those of the selection as it then is."""
    from canopy_store.store.embeddings import add_spectra, write_embeddings

    root = store(rollout_rows(prompts=("p", "q"), reward=[0.1, 0.2, 0.3, 0.4, 0.5]))
    run = "f.base.t"
    canopy_store.select_reward(root, 0.6, name="best")
    (rewards,) = stored.files(root, "rewards")
    rewrite(rewards, "rewards", lambda c: c.__setitem__("reward", c["reward"][::-1]))
    enter(root, rewards)
    ids, samples = ["p"] * 5 + ["q"] * 5, [*range(5)] * 2
    vectors = np.random.default_rng(0).normal(size=(10, 4))
    files = write_embeddings(root, "e", run, 0, ids, samples, vectors)
    stored.commit(root, "embeddings", {"embedder": "e", "run": run}, files, {})
    copies = (Path(shutil.copytree(root, tmp_path / str(i))) for i in range(1000))

    def selects(copy: Path) -> object:
        return canopy_store.select_reward(copy, 0.6, name="best")

    def embeds(copy: Path) -> None:  # as the ingest of embeddings ends
        with stored.holding(copy, run):
            add_spectra(copy, run)

    for call, beside in ((selects, embeds), (embeds, selects)):
        *roots, last = interleaved(lambda: next(copies), call, beside)
        assert len(roots) >= 2
        beside(last)
        for each in (*roots, last):
            spectra = canopy_store.read(each, "embedding_spectra").filter(selection="best")
            assert spectra["samples"].to_list() == [[0, 1, 2]] * 2, each
            assert verify(each).is_empty(), each


def test_a_break_between_rows_and_spectra_is_mended(tmp_path):
    root = tmp_path / "s"
    import_golden(root)
    canopy_store.select_reward(root, 0.7)
    before = canopy_store.read(root, "model_metrics").sort("run_id", "selection")
    lost = sorted((root / "embedding_spectra").rglob("*reward_top_70/run=*/*.parquet"))
    assert len(lost) == 8
    for path in lost[::2]:
        path.unlink()
    with pytest.raises(canopy_store.CanopyError, match="lost"):
        canopy_store.read(root, "model_metrics")
    canopy_store.select_reward(root, 0.7)
    assert_frame_equal(
        canopy_store.read(root, "model_metrics").sort("run_id", "selection"), before, rel_tol=1e-12
    )


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("caliper", [0, 0.1, 0.5])
def test_matched_lengths_are_pairs_and_as_many_as_can_be(seed, caliper):
    from canopy_store.analysis.selections import _match

    rng = np.random.default_rng(seed)
    left, right = (
        pl.DataFrame(
            {
                "run_id": [name] * n,
                "prompt_id": ["p"] * n,
                "sample": range(n),
                "n_tokens": rng.integers(1, 30, n),
            }
        )
        for name, n in (("a", int(rng.integers(1, 12))), ("b", int(rng.integers(1, 12))))
    )
    matched = _match(left, right, caliper)
    a, b = (matched.filter(run_id=name)["n_tokens"].to_numpy() for name in "ab")
    assert len(a) == len(b)
    pairs = np.maximum(a, b) / np.minimum(a, b)
    assert (pairs <= 1 + caliper + 1e-9).all()
    x, y = left["n_tokens"].to_numpy()[:, None], right["n_tokens"].to_numpy()[None]
    may = np.maximum(x, y) / np.minimum(x, y) <= 1 + caliper + 1e-12
    most = (maximum_bipartite_matching(csr_array(may.astype(np.int8))) >= 0).sum()
    assert len(a) == most


def test_matched_lengths_of_each_variant(store, canopy):
    rows = (
        rollout_rows("base", (10, 20, 30))
        + rollout_rows("sft", (11, 50, 29))
        + rollout_rows("dpo", (20, 20, 7))
    )
    root = store(rows)
    code, out, _ = canopy("select", "lengths", "--store", root)
    assert code == 0
    assert [line.split()[-1] for line in out.splitlines()] == [
        "lengths_matched_dpo",
        "lengths_matched_sft",
    ]
    frame = canopy_store.read(root, "prompt_metrics").sort("selection", "variant")
    found = (
        frame.filter(pl.col("selection") != "all").select("selection", "variant", "mean_length").rows()
    )
    assert found == [
        ("lengths_matched_dpo", "base", 20.0),
        ("lengths_matched_dpo", "dpo", 20.0),
        ("lengths_matched_sft", "base", 20.0),
        ("lengths_matched_sft", "sft", 20.0),
    ]


def test_what_is_refused(store, tmp_path):
    root = store(rollout_rows(reward=[0.1] * 5))
    for keep in (0, 1.1, float("nan")):
        with pytest.raises(UsageError, match="--keep"):
            canopy_store.select_reward(root, keep)
    with pytest.raises(UsageError, match="another name"):
        canopy_store.select_reward(root, 0.5, name="all")
    with pytest.raises(DataError, match="it has imported"):
        canopy_store.select_reward(root, 0.5, reward_model="mine")
    canopy_store.select_reward(root, 0.5, name="best")
    with pytest.raises(ConflictError, match=r"keep \(stored 0.5, asked 0.6\)"):
        canopy_store.select_reward(root, 0.6, name="best")
    with pytest.raises(DataError, match="'base' and another variant"):
        canopy_store.select_lengths(root)
    with pytest.raises(UsageError, match="--caliper"):
        canopy_store.select_lengths(root, caliper=-1)
    some = rollout_rows("sft", reward=[0.1, None, 0.3, 0.2, 0.1])
    canopy_store.import_rollouts(root, write_parquet(tmp_path / "some.parquet", some), max_new_tokens=64)
    with pytest.raises(DataError, match=r"run f\.sft\.t: 4 of 5"):
        canopy_store.select_reward(root, 0.5, name="best")


def test_no_rewards_and_no_match(store, canopy):
    root = store(rollout_rows() + rollout_rows("sft", (40, 41)))
    code, _, err = canopy("select", "reward", "--store", root, "--keep", 0.7)
    assert (code, err.count("\n")) == (1, 1)
    assert "no rewards" in err
    code, _, err = canopy("select", "lengths", "--store", root)
    assert (code, err.count("\n")) == (1, 1)
    assert "raise --caliper" in err


def test_the_rule_is_written_down(store):
    root = store(rollout_rows(reward=[0.1] * 5))
    canopy_store.select_reward(root, 0.7)
    plan = json.loads((root / "plans" / "selection=reward_top_70.json").read_text())
    assert plan["settings"] == {"rule": "reward", "keep": 0.7, "reward_model": "imported"}
