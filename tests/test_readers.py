"""Imports of what other tools wrote: real logs, the paper's tree and back, and every refusal."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pytest
from chain import save_chain
from stores import ingest_arguments, refused, write_prompts

import canopy_store
from canopy_store import readers, sql, store
from canopy_store.errors import DataError
from canopy_store.readers.openai_logprobs import listed_tokens, logged_tokens
from canopy_store.store.embeddings import write_embeddings

DATA = Path(__file__).parent / "data" / "readers"
WALKS = DATA / "walks.eval"
COLOURS = DATA / "samples_colours_2026-11-21T11-14-57.020158.jsonl"
HOPS_LM_EVAL = DATA / "samples_hops_2026-11-27T19-28-03.062178.jsonl"  # its results file beside it
HOPS_HF = DATA / "hops_hf.json"
CHOICE = DATA / "samples_choice_2026-11-21T11-14-57.020158.jsonl"
BATCH, REQUESTS = DATA / "openai_batch_output.jsonl", DATA / "openai_batch_input.jsonl"
VLLM = DATA / "vllm_batch_output.jsonl"
NAMED = ("--family", "f", "--variant", "v", "--task", "t")


def imported(canopy, root: Path, source: Path, *options: object) -> list[dict]:
    """The rollouts of a fresh store after an import that must succeed."""
    code, _, err = canopy("import", source, "--store", root, *options)
    assert code == 0, err
    code, out, _ = canopy("verify", "--store", root, "--deep")
    assert code == 0, out
    return canopy_store.read(root, "rollouts").sort("prompt_id", "sample").to_dicts()


# ---------------------------------------------------------------- the paper's tree


@pytest.fixture(scope="module")
def sampled(tmp_path_factory) -> Path:
    """A store of real rollouts of two tasks, in shards, with embeddings; built once."""
    from canopy_store.cli import main

    folder = tmp_path_factory.mktemp("sampled")
    model = save_chain(folder / "model")
    for task, texts in (("walk", "abc"), ("a/b", "de")):
        prompts = write_prompts(folder / f"{texts}.jsonl", *texts)
        options = {"samples": 8, "task": task, "prompts-per-shard": 2}
        assert main(ingest_arguments(folder / "s", model, prompts, **options)) == 0
    rng = np.random.default_rng(3)
    for path in store.files(folder / "s", "rollouts"):
        rows = store.read_rows(path)
        keys = rows["prompt_id"].to_pylist(), rows["sample"].to_pylist()
        number = int(path.stem.removeprefix("part-"))
        run = rows["run_id"][0].as_py()
        for name, dimension in (("small", 3), ("org/large", 384)):
            matrix = rng.standard_normal((len(rows), dimension))
            write_embeddings(folder / "s", name, run, number, *keys, matrix)
    return folder / "s"


def test_the_papers_tree_and_back_gives_every_view_to_the_last_bit(
    sampled, tmp_path, canopy, monkeypatch
):
    from canopy_store.readers.paper import write_tree

    tree = write_tree(sampled, tmp_path / "tree")
    shards = sorted(p.relative_to(tree).as_posix() for p in tree.rglob("rollout_shards/*"))
    assert shards[-1] == "chain/walk/base/chain.base.walk/rollout_shards/000002.safetensors"
    assert len(shards) == 5
    code, _, err = canopy("import", tree, "--store", tmp_path / "back")
    assert code == 0, err
    assert err == ""
    assert canopy("verify", "--store", tmp_path / "back", "--deep")[0] == 0
    # with several threads DuckDB adds up in another order each time it is asked
    connect = duckdb.connect
    monkeypatch.setattr(duckdb, "connect", lambda config: connect(config={**config, "threads": 1}))
    compared = 0
    # what sampling took stands in no tree
    views = [view for view in sql.VIEWS if view != "cost_per_token"]
    for view in ("rollouts", "embeddings", "embedding_spectra", *views):
        before, after = (canopy_store.read(root, view) for root in (sampled, tmp_path / "back"))
        keys = [c for c in before.columns if before[c].dtype in (pl.String, pl.Int32, pl.Boolean)]
        before, after = before.sort(keys), after.sort(keys)
        assert before.equals(after), view
        compared += len(before)
    assert compared > 300


def paper_tree(root: Path, lengths=(3, 1), **changes: object) -> Path:
    """One prompt's shard as the paper's code saves it; a change replaces a tensor or header."""
    from safetensors.numpy import save_file

    total = int(sum(n for n in lengths if n > 0))
    tensors = {
        "prompt_token_ids": np.array([5, 6], np.int64),
        "sequence_lengths": np.array(lengths, np.int64),
        "generated_token_ids_flat": np.arange(total, dtype=np.int64),
        "step_conditional_entropy_flat": np.linspace(0.25, 1, total, dtype=np.float32),
        **{
            f"sequence_step_logprobs.{i:05d}": np.log(np.full((n, 4), 0.25, np.float32))
            for i, n in enumerate(lengths)
            if n > 0
        },
    }
    header = {
        "prompt": "Say it.",
        "generated_texts": json.dumps([f"text {i}" for i in range(len(lengths))]),
    }
    for key, value in changes.items():
        (header if isinstance(value, str) else tensors)[key] = value
    run = root / "tiny" / "math" / "base" / "rollouts"
    for folder in ("rollout_shards", "embedding_shards/mini"):
        (run / folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, run / "rollout_shards" / "000000.safetensors", metadata=header)
    matrix = np.eye(len(lengths), 4, dtype=np.float32)
    save_file({"embeddings": matrix}, run / "embedding_shards" / "mini" / "000000.safetensors")
    (run / "metadata.json").write_text(
        json.dumps(
            {
                "prompt_file": "data/math.jsonl",
                "num_prompts_processed": 1,
                "model_name": "tiny",
                "model_variant": "base",
                "n_samples": 2,
                "max_new_tokens": 3,
                "temperature": 1.0,
                "top_k": 4,
                "top_p": 1.0,
                "seed": 1,
                "logprobs": 4,
                "enable_thinking": False,
            }
        )
    )
    return root


def test_a_tree_of_the_papers_own_code(tmp_path, canopy):
    tree = paper_tree(tmp_path / "outputs")
    first, second = imported(canopy, tmp_path / "s", tree)
    assert (first["run_id"], first["task"], first["text"]) == ("tiny.base.math", "math", "text 0")
    assert (first["token_ids"], first["entropy"]) == ([0, 1, 2], pytest.approx([0.25, 0.5, 0.75]))
    assert (second["token_ids"], second["entropy_sum"]) == ([3], 1.0)
    assert [first["finish_reason"], second["finish_reason"]] == ["length", "stop"]
    assert first["logprob"] is None  # of candidates without ids
    prompt = canopy_store.read(tmp_path / "s", "prompts").row(0, named=True)
    assert (prompt["text"], prompt["prompt_id"]) == ("Say it.", store.content_id({"text": "Say it."}))
    run = canopy_store.read(tmp_path / "s", "runs").row(0, named=True)
    assert (run["temperature"], run["top_k"], run["top_p"], run["max_new_tokens"]) == (1.0, 4, 1.0, 3)
    metrics = canopy_store.read(tmp_path / "s", "model_metrics").row(0, named=True)
    assert (metrics["embedder"], metrics["semantic_diversity"]) == ("mini", 1.0)
    # a part of the tree tells the same names, and other versions call the folder otherwise
    run_folder = tree / "tiny" / "math" / "base" / "rollouts"
    (run_folder / "rollout_shards").rename(run_folder / "prompt_shards")
    again = imported(canopy, tmp_path / "s2", run_folder, "--variant", "other")
    assert [row["run_id"] for row in again] == ["tiny.other.math"] * 2


def test_what_the_tree_is_said_to_lack(tmp_path, canopy):
    tree = paper_tree(tmp_path / "outputs")
    metadata = next(tree.rglob("metadata.json"))
    said = json.loads(metadata.read_text()) | {"top_k": -1, "num_prompts_processed": 8}
    metadata.write_text(json.dumps(said))
    code, _, err = canopy("import", tree, "--store", tmp_path / "s")
    assert code == 0
    assert "entropies were taken over the 4 likeliest tokens" in err
    assert "holds 1 shards of 8 prompts" in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_lengths": np.array([3, 2])}, "000000.safetensors: sequence_lengths do not add up"),
        ({"sequence_lengths": np.array([5, -1])}, "sequence_lengths do not add up to the 4 tokens"),
        ({"sequence_lengths": np.array([2**62, 2**62 + 4])}, "sequence_lengths do not add up"),
        ({"sequence_lengths": np.array([4, 0])}, "rollout 1: a rollout of no tokens"),
        ({"sequence_lengths": np.array([[3, 1]])}, "sequence_lengths is int64 of shape (1, 2)"),
        ({"generated_texts": "[1, 2]"}, "generated_texts needs a list of 2, one a rollout"),
        ({"generated_texts": '["a"]'}, "generated_texts needs a list of 2, one a rollout"),
        ({"generated_texts": "{"}, "generated_texts: not JSON"),
        ({"generated_texts": '["\\ud800", "b"]'}, "rollout 0: text cannot be kept"),
        ({"generated_token_ids_flat": np.array([0, 1, 2, 2**40])}, "rollout 1: token_ids cannot"),
        ({"generated_token_ids_flat": np.array([0, -1, 2, 3])}, "rollout 0: token_ids needs ids from 0"),
        (
            {"step_conditional_entropy_flat": np.array([0.5, 0.5, 0.5, np.nan], np.float32)},
            "rollout 1: entropy at step 1 is nan",
        ),
        (
            {"step_conditional_entropy_flat": np.array([0.5, -1.0, 0.5, 0.5], np.float32)},
            "rollout 0: entropy at step 2 is -1.0",
        ),
        ({"step_conditional_entropy_flat": np.zeros(3, np.float32)}, "entropy has 3 steps"),
    ],
)
def test_damaged_trees(tmp_path, canopy, changes, message):
    tree = paper_tree(tmp_path / "outputs", **changes)
    refused(canopy("import", tree, "--store", tmp_path / "s"), 1, message)
    assert len(canopy_store.read(tmp_path / "s", "rollouts") if (tmp_path / "s").exists() else []) == 0


def test_a_tree_that_leads_out_of_itself_or_is_cut_short(tmp_path, canopy):
    tree = paper_tree(tmp_path / "outputs")
    shard = next(tree.rglob("rollout_shards/*.safetensors"))
    other = paper_tree(tmp_path / "other") / shard.relative_to(tree)
    shard.unlink()
    shard.symlink_to(other)
    refused(canopy("import", tree, "--store", tmp_path / "s"), 1, str(shard), "leads out of")
    shard.unlink()
    shard.write_bytes(other.read_bytes()[:-1])
    refused(canopy("import", tree, "--store", tmp_path / "s"), 1, str(shard), "truncated")
    shard.write_bytes(b"\xff" * 8 + b"{}")  # a header of 2**64 bytes
    refused(canopy("import", tree, "--store", tmp_path / "s"), 1, str(shard), "truncated")


def test_two_runs_of_one_name(tmp_path, canopy):
    tree = paper_tree(tmp_path / "outputs")
    run = tree / "tiny" / "math" / "base" / "rollouts"
    shutil.copytree(run, run.with_name("rollouts_again"))
    refused(canopy("import", tree, "--store", tmp_path / "s"), 1, "rollouts and rollouts_again", "--run")


# ---------------------------------------------------------------- lm-evaluation-harness


def test_lm_eval_samples_are_texts_until_a_tokenizer_is_given(tmp_path, chain, canopy):
    named = ("--family", "chain", "--variant", "base", "--top-k", 0)
    result = canopy("import", COLOURS, "--store", tmp_path / "s", *named)
    refused(result, 2, COLOURS.name, "line 1, response 0: tells no tokens", "--tokenizer")
    assert not (tmp_path / "s").exists()
    rows = imported(canopy, tmp_path / "s", COLOURS, *named, "--tokenizer", chain)
    assert [(r["prompt_id"], r["sample"]) for r in rows] == [(p, s) for p in "012" for s in (0, 1)]
    assert (rows[0]["text"], rows[0]["token_ids"]) == ("c d", [3, 4])
    assert {r["run_id"] for r in rows} == {"chain.base.colours"}  # the task, from the file's name
    # of eight tokens, as many as max_gen_toks: but these are the text's, and not those sampled
    assert rows[1]["n_tokens"] == 8
    assert {r["finish_reason"] for r in rows} == {None}
    assert {r["entropy"] is None and r["logprob"] is None for r in rows} == {True}
    run = canopy_store.read(tmp_path / "s", "runs").row(0, named=True)
    assert (run["temperature"], run["top_k"], run["top_p"], run["logged"]) == (0.7, 0, 1.0, False)
    assert json.loads(run["settings"])["tokenizer_sha256"]
    assert canopy_store.read(tmp_path / "s", "model_metrics")["ce_star"].to_list() == [None]


def test_a_log_of_transformers_generate_that_names_no_top_k_asks_for_it(tmp_path, chain, canopy):
    named = ("--family", "chain", "--variant", "base", "--tokenizer", chain)
    for source, why in (
        (HOPS_LM_EVAL, "sampled by transformers' generate, which keeps the 50 likeliest tokens unless"),
        (HOPS_HF, "sampled by transformers' generate, which keeps the 50 likeliest tokens unless"),
        (COLOURS, "the log names neither its engine (no results file of the same date"),
    ):
        result = canopy("import", source, "--store", tmp_path / "s", *named)
        refused(result, 2, source.name, why, "give --top-k, 0 where it was off")
    assert not (tmp_path / "s").exists()
    imported(canopy, tmp_path / "s", HOPS_LM_EVAL, *named, "--top-k", 50)
    run = canopy_store.read(tmp_path / "s", "runs").row(0, named=True)
    assert (run["temperature"], run["top_k"]) == (1.0, 50)


@pytest.mark.parametrize(
    ("engine", "settings", "top_k"),
    [
        ("vllm", {}, 0),  # samples from all tokens where it is not told otherwise
        ("hf", {"top_k": 20}, 20),
        ("hf", {"do_sample": False}, 0),  # greedy needs none
    ],
)
def test_lm_eval_logs_that_tell_their_top_k(tmp_path, chain, canopy, engine, settings, top_k):
    lines = [json.loads(line) for line in HOPS_LM_EVAL.read_text().splitlines()]
    for line in lines:
        line["arguments"]["gen_args_0"]["arg_1"] |= settings
    source = tmp_path / HOPS_LM_EVAL.name
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    beside = HOPS_LM_EVAL.name.replace("samples_hops_", "results_").replace(".jsonl", ".json")
    results = json.loads((DATA / beside).read_text())
    results["config"]["model"] = engine
    (tmp_path / beside).write_text(json.dumps(results))
    imported(canopy, tmp_path / "s", source, *NAMED, "--tokenizer", chain)
    run = canopy_store.read(tmp_path / "s", "runs").row(0, named=True)
    assert run["top_k"] == top_k


def test_scores_of_given_answers_are_no_rollouts(tmp_path):
    with pytest.raises(DataError, match="given answers has no rollouts; canopy import makes items of"):
        canopy_store.import_rollouts(tmp_path / "s", CHOICE, family="chain", variant="base")


# ---------------------------------------------------------------- Inspect


def test_an_inspect_log(tmp_path, canopy):
    rows = imported(canopy, tmp_path / "s", WALKS, "--family", "mock", "--variant", "base")
    assert [(r["prompt_id"], r["sample"], r["text"]) for r in rows] == [
        ("7", 0, "It is 4"),
        ("7", 1, "I see grey."),
        ("sum", 0, "four."),
        ("sum", 1, "blue"),
    ]
    assert rows[0]["logprob"] == [-1.5, -0.125, -0.75]
    assert [r["finish_reason"] for r in rows] == ["length", "stop", "stop", "stop"]
    assert {r["task"] for r in rows} == {"walks"}
    assert rows[0]["top_logprobs"] is None  # of tokens whose ids are not known
    prompts = canopy_store.read(tmp_path / "s", "prompts").sort("prompt_id")
    assert json.loads(prompts["messages"][1]) == [{"role": "user", "content": "What is two plus two?"}]
    model = canopy_store.read(tmp_path / "s", "models").row(0, named=True)
    assert model["source"] == "mockllm/model"
    logged = canopy_store.read(tmp_path / "s", "model_metrics").row(0, named=True)
    assert logged["surprisal_mean"] == pytest.approx((2.375 + 6.53125 + 0.75 + 0.0625) / 4)
    assert logged["ce_star"] is None


def test_inspects_hf_engine_logs_the_likeliest_token_and_not_the_sampled_one(tmp_path, chain, canopy):
    log = json.loads(HOPS_HF.read_text())
    choice = log["samples"][0]["output"]["choices"][0]
    text, logged = choice["message"]["content"], choice["logprobs"]["content"]
    assert text.split() != [token["token"] for token in logged][: len(text.split())]
    assert all(token["logprob"] == max(t["logprob"] for t in token["top_logprobs"]) for token in logged)
    options = (*NAMED, "--top-k", 50)
    result = canopy("import", HOPS_HF, "--store", tmp_path / "s", *options)
    refused(result, 2, "sample 1, choice 0: tells no tokens", "--tokenizer")
    options = (*options, "--tokenizer", chain, "--processed-logprobs")
    code, _, err = canopy("import", HOPS_HF, "--store", tmp_path / "s", *options)
    assert code == 0, err
    # one ended at once, which usage counts as 8 tokens of padding
    assert "1 rollouts are left out, as their text holds no token" in err
    assert "first sample 4, choice 0" in err
    assert "logprob of 3 rollouts is left out: Inspect's hf engine logs those of each step's" in err
    rows = canopy_store.read(tmp_path / "s", "rollouts").sort("prompt_id", "sample")
    assert rows["logprob"].null_count() == rows["top_logprobs"].null_count() == 3
    assert rows["n_tokens"].to_list() == [len(t.split()) for t in rows["text"]] == [7, 6, 7]


def test_a_folder_of_inspect_logs_is_read_each_sample_once(tmp_path, canopy):
    named = ("--family", "mock", "--variant", "base")
    folder = tmp_path / "logs"
    (folder / "later").mkdir(parents=True)
    shutil.copy(WALKS, folder / "1.eval")
    found = members(WALKS)
    samples = [value for name, value in found.items() if name.startswith("samples/")]
    retried = json.loads(json.dumps(samples[:1]))
    retried[0]["uuid"] = "another"
    log = {"version": 2, **found["header.json"], "samples": [samples[1], *retried]}
    (folder / "later" / "2.json").write_text(json.dumps(log))
    (folder / "notes.json").write_text("{}")
    (folder / "out.json").symlink_to(HOPS_HF)
    code, _, err = canopy("import", folder, "--store", tmp_path / "s", *named)
    assert code == 0, err
    assert "1 samples are in more than one log and are read once" in err
    rows = canopy_store.read(tmp_path / "s", "rollouts").sort("prompt_id", "sample")
    alone = imported(canopy, tmp_path / "alone", WALKS, *named)
    assert len(rows) == len(alone) + 1
    assert rows.filter(sample=2)["text"].to_list() == [samples[0]["output"]["completion"]]
    whole = {"version": 2, **found["header.json"], "samples": samples}
    (tmp_path / "whole.json").write_text(json.dumps(whole))
    assert imported(canopy, tmp_path / "s2", tmp_path / "whole.json", *named) == alone
    (tmp_path / "whole.json").write_text(json.dumps(whole)[:-9])
    result = canopy("import", tmp_path / "whole.json", "--store", tmp_path / "s3", *named)
    refused(result, 1, "whole.json: not JSON")


def members(path: Path) -> dict[str, object]:
    """An .eval log's members, decoded by the reader's own hand."""
    from canopy_store.readers.inspect_log import _member

    with zipfile.ZipFile(path) as log:
        return {name: _member(log, path, name) for name in log.namelist()}


def rewritten(path: Path, change, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    """The log with deflated members, as older versions write it, after ``change``."""
    found = members(WALKS)
    change(found)
    with zipfile.ZipFile(path, "w", compression) as log:
        for name, value in found.items():
            log.writestr(name, json.dumps(value))
    return path


def test_older_inspect_logs_hold_the_same(tmp_path, canopy):
    named = ("--family", "mock", "--variant", "base")
    newer = imported(canopy, tmp_path / "s", WALKS, *named)
    log = rewritten(tmp_path / "old.eval", lambda found: found.pop("header.json"))  # a broken run's
    assert imported(canopy, tmp_path / "s2", log, *named) == newer


def test_raw_logprobs_are_not_taken_for_those_of_the_policy(tmp_path, canopy):
    def hot(found):
        found["header.json"]["eval"]["model_generate_config"] |= {"temperature": 0.7, "top_p": 0.9}

    log = rewritten(tmp_path / "hot.eval", hot)
    named = ("--family", "mock", "--variant", "base", "--store")
    code, _, err = canopy("import", log, *named, tmp_path / "s")
    assert code == 0
    assert "logprob of 4 rollouts is left out" in err
    assert "--processed-logprobs" in err
    rows = canopy_store.read(tmp_path / "s", "rollouts").sort("prompt_id", "sample")
    assert rows["logprob"].null_count() == 4
    assert rows["n_tokens"].to_list() == [3, 4, 2, 1]
    code, _, err = canopy("import", log, *named, tmp_path / "s2", "--processed-logprobs")
    assert code == 0
    assert err.count("left out") == 1
    assert "top_logprobs of 4 rollouts is left out: the ids" in err
    assert canopy_store.read(tmp_path / "s2", "rollouts")["logprob"].null_count() == 0


def first_sample(found: dict) -> dict:
    return found["samples/7_epoch_1.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: first_sample(f)["messages"].append(first_sample(f)["messages"][-1]),
            "samples/7_epoch_1.json: 2 generations; a rollout is one, from its prompt",
        ),
        (
            lambda f: first_sample(f)["output"]["choices"][0]["logprobs"]["content"][1].pop("logprob"),
            "samples/7_epoch_1.json, choice 0: token 2: logprob needs a number",
        ),
        (
            lambda f: first_sample(f)["output"]["choices"][0]["logprobs"]["content"][0].update(
                logprob=0.5
            ),
            "samples/7_epoch_1.json, choice 0: token 1: logprob 0.5 is no log-probability",
        ),
        (lambda f: first_sample(f).pop("messages"), "samples/7_epoch_1.json: messages needs a list"),
        (
            lambda f: f["header.json"]["eval"]["model_generate_config"].update(temperature="hot"),
            "header.json: temperature needs a whole number or a number",
        ),
        (lambda f: f.update({"samples/7_epoch_1/sample.json": {}}), "stored in chunks"),
        (lambda f: [f.pop(n) for n in list(f) if n.startswith("samples/")], "holds no rollouts"),
    ],
)
def test_damaged_inspect_logs(tmp_path, canopy, change, message):
    log = rewritten(tmp_path / "log.eval", change)
    refused(canopy("import", log, "--store", tmp_path / "s", *NAMED), 1, message)


def test_a_sample_that_failed_is_left_out_and_said(tmp_path, canopy):
    log = rewritten(tmp_path / "log.eval", lambda f: first_sample(f).update(error={"message": "no"}))
    code, _, err = canopy("import", log, "--store", tmp_path / "s", *NAMED)
    assert code == 0
    assert "1 samples have no generation and are left out, first samples/7_epoch_1.json" in err
    assert len(canopy_store.read(tmp_path / "s", "rollouts")) == 3


def test_a_member_that_decodes_to_too_much(tmp_path, canopy, monkeypatch):
    log = rewritten(tmp_path / "log.eval", lambda f: first_sample(f).update(target="a" * 2_000_000))
    assert log.stat().st_size < 30_000
    monkeypatch.setattr("canopy_store.readers.inspect_log.LONGEST", 1 << 20)
    monkeypatch.setattr("canopy_store.readers.LONGEST", 1 << 20)
    refused(canopy("import", log, "--store", tmp_path / "s", *NAMED), 1, "longer than 1 MiB")
    cut = tmp_path / "cut.eval"
    cut.write_bytes(WALKS.read_bytes()[:-100])
    result = canopy("import", cut, "--store", tmp_path / "s", *NAMED, "--format", "inspect")
    refused(result, 1, "truncated or not an .eval log")
    spoilt = bytearray(WALKS.read_bytes())
    spoilt[1500] ^= 1
    cut.write_bytes(spoilt)
    refused(canopy("import", cut, "--store", tmp_path / "s", *NAMED), 1, "damaged or truncated")


# ---------------------------------------------------------------- OpenAI and vLLM batches


def test_an_openai_batch(tmp_path, canopy):
    code, _, err = canopy("import", BATCH, "--store", tmp_path / "s", *NAMED)
    refused((code, "", err), 2, "line 1, choice 0: does not tell how it was sampled", "--temperature")
    code, _, err = canopy("import", BATCH, "--store", tmp_path / "s", *NAMED, "--requests", REQUESTS)
    assert code == 0
    assert "1 answers failed or were filtered and are left out, first line 3" in err
    rows = canopy_store.read(tmp_path / "s", "rollouts").sort("text").to_dicts()
    assert [r["text"] for r in rows] == ["It is 4", "blue", "four.", "red—"]
    assert rows[0]["logprob"] == [-2.0, -0.125, -0.75]
    assert [r["finish_reason"] for r in rows] == ["length", "stop", "stop", "stop"]
    # two requests of one prompt are its rollouts
    assert rows[1]["prompt_id"] == rows[3]["prompt_id"]
    assert [rows[1]["sample"], rows[3]["sample"]] == [0, 1]
    content = {"messages": [{"role": "user", "content": "Name a colour."}]}
    assert rows[1]["prompt_id"] == store.content_id(content)
    run = canopy_store.read(tmp_path / "s", "runs").row(0, named=True)
    assert (run["temperature"], run["max_new_tokens"]) == (1.0, 3)


def byte_level(folder: Path, *texts: str) -> Path:
    """A byte-level BPE tokenizer whose words are single tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def test_tokens_known_as_text_get_ids_from_the_tokenizer(tmp_path, canopy):
    words = ("four", "4", ".", "!", "It", " is", " was", " 4", " four", "red", "blue", "—")
    folder = byte_level(tmp_path / "tokenizer", *(w for w in words for _ in range(9)))
    options = (*NAMED, "--temperature", 1, "--tokenizer", folder)
    rows = imported(canopy, tmp_path / "s", BATCH, *options)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row in rows:
        assert tokenizer.decode(row["token_ids"]) == row["text"]
        assert len(row["token_ids"]) == len(row["logprob"])
    first = next(r for r in rows if r["text"] == "four.")
    assert [tokenizer.decode([i]) for i in first["top_token_ids"][0]] == ["four", "4"]
    assert first["top_logprobs"] == [[-0.25, -1.75], [-0.5, -2.5]]
    poor = byte_level(tmp_path / "poor", "four . It is 4")
    result = canopy("import", BATCH, "--store", tmp_path / "s2", *options[:-1], poor)
    refused(result, 1, "line 2, choice 0: token 1: 'blue' is not one token of the tokenizer alone")


def test_a_vllm_batch_with_token_ids(tmp_path, canopy):
    rows = imported(canopy, tmp_path / "s", VLLM, *NAMED, "--temperature", 1)
    assert [r["token_ids"] for r in rows] == [[2, 3, 0], [4, 5]]
    assert rows[0]["logprob"] == [-0.5, -1.25, -0.0625]
    assert rows[0]["top_token_ids"] == [[2, 3], [1, 3], [0]]  # -9999 is no log-probability
    assert rows[0]["top_logprobs"] == [[-0.5, -1.5], [-0.75, -1.25], [-0.0625]]
    assert [r["finish_reason"] for r in rows] == ["stop", "length"]


def test_a_vllm_batch_is_completed_by_scores_of_its_own_model(tmp_path, chain, canopy):
    """What the engine gave comes first; what it lacks comes from the model, by the views."""
    source = tmp_path / "out.jsonl"
    lines = [json.loads(line) for line in VLLM.read_text().splitlines()]
    requests = [
        {"custom_id": i["custom_id"], "body": {"prompt": t, "temperature": 1}}
        for i, t in zip(lines, "ab", strict=True)
    ]
    asked = tmp_path / "in.jsonl"
    asked.write_text("".join(json.dumps(r) + "\n" for r in requests))
    source.write_bytes(VLLM.read_bytes())
    named = ("--family", "chain", "--variant", "base", "--task", "t", "--requests", asked)
    imported(canopy, tmp_path / "s", source, *named)
    assert canopy_store.read(tmp_path / "s", "model_metrics")["ce_star"].to_list() == [None]
    arguments = ("--store", tmp_path / "s", "--scorer", chain, "--name", "chain/base")
    code, _, err = canopy("ingest", "score", *arguments, "--template", "plain")
    assert code == 0, err
    assert canopy_store.read(tmp_path / "s", "model_metrics")["ce_star"][0] > 0


def changed(path: Path, change) -> Path:
    lines = [json.loads(line) for line in VLLM.read_text().splitlines()]
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def choice(lines: list[dict], line: int) -> dict:
    return lines[line]["response"]["body"]["choices"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f[1].pop("custom_id"), "line 2: custom_id needs text"),
        (lambda f: f[0]["response"]["body"].pop("choices"), "line 1: choices needs a list"),
        (lambda f: choice(f, 0)["logprobs"]["tokens"].pop(), "tokens, token_logprobs and top_logprobs"),
        (lambda f: choice(f, 0)["logprobs"]["token_logprobs"].__setitem__(0, None), "without echo"),
        (
            lambda f: choice(f, 1)["logprobs"]["content"][0].update(logprob=-9999.0),
            "line 2, choice 0: token 1: logprob -9999 says that it is not known",
        ),
        (
            lambda f: choice(f, 1)["logprobs"]["content"][0].update(logprob=float("nan")),
            "line 2, choice 0: token 1: logprob nan is no log-probability",
        ),
        (
            lambda f: choice(f, 1)["logprobs"]["content"][0].update(logprob=10**400),
            "line 2, choice 0: token 1: logprob inf is no log-probability",
        ),
        (
            lambda f: choice(f, 1)["logprobs"]["content"][0].update(logprob=float("-inf")),
            "line 2, choice 0: token 1: logprob -inf says that it is not known",
        ),
        (lambda f: choice(f, 1).update(token_ids=[1]), "token_ids and logprob differ in length"),
        (
            lambda f: choice(f, 1).update(token_ids=[1, "2"]),
            "line 2, choice 0: token 2 has an id that is no whole number, and token ids go from 0 to",
        ),
        (
            lambda f: choice(f, 1).update(token_ids=[1, 2**31]),
            "choice 0: token 2 has id 2147483648, and",
        ),
        (lambda f: choice(f, 1).update(token_ids=[-1, 2]), "choice 0: token 1 has id -1, and token ids"),
        (lambda f: f[1]["response"]["body"].update(model="another"), "model is chain and another"),
    ],
)
def test_damaged_batches(tmp_path, canopy, change, message):
    source = changed(tmp_path / "in.jsonl", change)
    options = ("--format", "openai-batch", *NAMED, "--temperature", 1)
    refused(canopy("import", source, "--store", tmp_path / "s", *options), 1, message)


def test_both_forms_of_log_probabilities_are_read_to_the_same_tokens():
    listed = {"token": "é", "logprob": -0.5, "bytes": [195, 169], "top_logprobs": []}
    log = [
        {**listed, "top_logprobs": [{"token": "é", "logprob": -0.5}, {"token": "e", "logprob": -9999}]},
        {"token": "token_id:7", "logprob": 1e-7, "top_logprobs": [{"token": "x", "logprob": None}]},
    ]
    side_by_side = {
        "tokens": ["é", "token_id:7"],
        "token_logprobs": [-0.5, 1e-7],
        "top_logprobs": [{"é": -0.5, "e": -9999.0}, {"x": None}],
    }
    first, second = logged_tokens({"logprobs": {"content": log}}, "here")
    assert logged_tokens({"logprobs": side_by_side}, "here") == [first, second]
    table = {"é".encode(): 3, b"e": 4, b"x": 5}
    assert [token.token_id(table) for token in (first, second)] == [3, 7]
    assert [token.logprob for token in (first, second)] == [-0.5, 0.0]  # above 0 by rounding alone
    assert [(top.token_id(table), top.logprob) for top in first.tops] == [(3, -0.5), (4, None)]
    assert [top.logprob for top in second.tops] == [None]
    # an engine that gives characters for bytes, one that writes what bytes it has as text, and one
    # whose text has lost them
    for text, given, number in (("é", [233], 3), ("\\xc3\\xa9", [195, 169], 3), ("\ufffd", None, None)):
        (token,) = listed_tokens([{"token": text, "logprob": -1, "bytes": given}], "here")
        assert token.token_id({**table, "\ufffd".encode(): 9}) == number, text


def test_bytes_that_are_code_points_name_pieces_of_the_vocabulary(tmp_path):
    """Inspect's local engines write ``bytes = [ord(c) for c in piece]``: of 'Ġis', 288 is the first."""
    from transformers import AutoTokenizer

    from canopy_store.readers.openai_logprobs import token_table

    words = [w for w in (" is", "é", "—", "blue") for _ in range(9)]
    tokenizer = AutoTokenizer.from_pretrained(byte_level(tmp_path / "t", *words))
    table = token_table(tokenizer)
    for text in (" is", " é", "—", "blue"):
        ids = tokenizer(text)["input_ids"]
        pieces = tokenizer.convert_ids_to_tokens(ids)
        log = [{"token": p, "logprob": -1, "bytes": [ord(c) for c in p]} for p in (*pieces, "Ġis")]
        tokens = listed_tokens(log, "here")
        assert [token.token_id(table) for token in tokens[:-1]] == ids, text
    # without one above 255 they are characters: 'é' is no piece, and 'Ã©' two letters
    (token,) = listed_tokens([{"token": "é", "logprob": -1, "bytes": [233]}], "here")
    assert token.token_id(table) == tokenizer.convert_tokens_to_ids("Ã©")


# ---------------------------------------------------------------- what every format shares


def test_names_and_formats_that_nobody_tells(tmp_path, canopy):
    refused(canopy("import", WALKS, "--store", tmp_path / "s", "--family", "f"), 2, "--variant")
    refused(
        canopy("import", WALKS, "--store", tmp_path / "s", "--format", "csv"), 2, "there are parquet"
    )
    strange = tmp_path / "x.txt"
    strange.write_text("hello\n")
    refused(canopy("import", strange, "--store", tmp_path / "s"), 1, "no reader knows this format")
    refused(canopy("import", tmp_path / "no", "--store", tmp_path / "s"), 1, "no such file or folder")


@pytest.mark.parametrize("source", ["paper", COLOURS, WALKS, BATCH])
def test_the_same_again_changes_nothing_and_another_is_refused(tmp_path, chain, canopy, source):
    source = paper_tree(tmp_path / "tree") if source == "paper" else source
    options = (
        "--family",
        "f",
        "--variant",
        "v",
        "--task",
        "t",
        "--temperature",
        1,
        "--top-k",
        0,
        "--tokenizer",
        chain,
    )
    options = options[:-2] if source in (WALKS, BATCH) else options
    imported(canopy, tmp_path / "s", source, *options)
    before = {p: p.read_bytes() for p in (tmp_path / "s").rglob("*.parquet")}
    assert canopy("import", source, "--store", tmp_path / "s", *options)[0] == 0
    assert {p: p.read_bytes() for p in (tmp_path / "s").rglob("*.parquet")} == before
    result = canopy("import", VLLM, "--store", tmp_path / "s", *options[:10])
    refused(result, 1, "f.v.t is stored with other settings", "source_sha256")


KILLED = """
import json, os, signal, sys
from canopy_store.cli import main
arguments, calls = json.loads(sys.argv[1])
real = os.fsync
for last in calls:  # killed while the last of so many files is written, then once not at all
    child = os.fork()
    if child == 0:
        count = 0
        def fsync(fd):
            global count
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)
            real(fd)
        os.fsync = fsync
        os._exit(main(arguments))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != (-9 if last else 0):
        sys.exit(f"{last}: exit code {code}")
"""


def test_kill_9_loses_nothing(tmp_path, canopy):
    tree = paper_tree(tmp_path / "outputs")
    whole = imported(canopy, tmp_path / "whole", tree)
    arguments = ["import", str(tree), "--store", str(tmp_path / "s")]
    for calls in ([1, 4, 0], [6, 11, 15, 0]):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, json.dumps([arguments, calls])],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-1000:]
        assert canopy("verify", "--store", tmp_path / "s", "--deep")[0] == 0
        assert canopy_store.read(tmp_path / "s", "rollouts").sort("sample").to_dicts() == whole
        shutil.rmtree(tmp_path / "s")


def test_an_imported_store_does_not_depend_on_the_size_of_batches(tmp_path, canopy, monkeypatch):
    whole = imported(canopy, tmp_path / "s", VLLM, *NAMED, "--temperature", 1)
    monkeypatch.setattr("canopy_store.readers.staging._VALUES_AT_ONCE", 1)
    assert imported(canopy, tmp_path / "s2", VLLM, *NAMED, "--temperature", 1) == whole


def test_parquet_takes_names_lengths_and_prompts(tmp_path, canopy):
    file = tmp_path / "in.parquet"
    columns = {
        "variant": "old",
        "prompt_id": ["p", "q"],
        "sample": 0,
        "n_tokens": [3, 4],
        "prompt": ["Say p.", "Say q."],
        "temperature": 0.5,
        "max_new_tokens": 4,
    }
    pl.DataFrame(columns).write_parquet(file)
    rows = imported(canopy, tmp_path / "s", file, *NAMED)
    assert [(r["variant"], r["n_tokens"], r["finish_reason"]) for r in rows] == [
        ("v", 3, "stop"),
        ("v", 4, "length"),
    ]
    run = canopy_store.read(tmp_path / "s", "runs").row(0, named=True)
    assert (run["temperature"], run["top_k"], run["top_p"]) == (0.5, 0, 1.0)
    prompts = canopy_store.read(tmp_path / "s", "prompts").sort("prompt_id")
    assert prompts["text"].to_list() == ["Say p.", "Say q."]
    frame = pl.read_parquet(file).with_columns(family=pl.lit("f"), task=pl.lit("t"))
    for change, message in [
        ({"n_tokens": pl.Series([3, None])}, "row 1: n_tokens is None"),
        ({"n_tokens": pl.Series([3, -1])}, "row 1: n_tokens is -1"),
        ({"n_tokens": pl.Series([3, 0])}, "row 1: a rollout of no tokens"),
        ({"temperature": pl.Series([1.0, 0.5])}, "temperature is 1.0 and 0.5; a run has one"),
        ({"temperature": pl.Series([-1.0, -1.0])}, "temperature -1.0: needs 0 (greedy) or more"),
        ({"prompt": pl.Series([1, 2])}, "column prompt is int64, needs text"),
    ]:
        frame.with_columns(**change).write_parquet(file)
        refused(canopy("import", file, "--store", tmp_path / "s2"), 1, message)
    frame.drop("n_tokens").write_parquet(file)
    refused(canopy("import", file, "--store", tmp_path / "s2"), 1, "missing column entropy (or logprob,")


def test_a_strangers_package_adds_a_reader(tmp_path, canopy):
    """A real installed distribution with an entry point, in a folder of its own."""
    (tmp_path / "stranger.py").write_text(
        "def sniff(path):\n    return path.suffix == '.strange'\n\n"
        "def read(path, told):\n"
        "    for sample, word in enumerate(path.read_text().split()):\n"
        "        yield {'prompt_id': 'p', 'sample': sample, 'text': word,\n"
        "               'entropy': [0.5] * len(word), 'family': 'f', 'variant': 'v', 'task': 't'}\n"
    )
    metadata = tmp_path / "stranger-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[canopy_store.readers]\nstrange = stranger\nbroken = stranger:nothing\n"
    )
    (tmp_path / "in.strange").write_text("one three\n")
    command = [
        sys.executable,
        "-m",
        "canopy_store.cli",
        "import",
        str(tmp_path / "in.strange"),
        "--store",
        str(tmp_path / "s"),
    ]
    paths = [str(tmp_path), str(Path(canopy_store.__file__).parents[1])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([*command, "--format", "strange"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert canopy_store.read(tmp_path / "s", "rollouts")["entropy_sum"].sort().to_list() == [1.5, 2.5]
    done = subprocess.run([*command, "--format", "broken"], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "stranger:nothing is no reader: it needs sniff and read" in done.stderr


def test_every_format_is_in_the_help(canopy):
    out = canopy("import", "--help")[1]
    assert all(name in out for name in ("parquet", *readers.formats()))
