"""Every refusal is one line that names the place and what to do; nothing stored is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chain import CHAIN_LOGITS, save_chain
from stores import ingest_arguments, refused, write_prompts

import canopy_store
from canopy_store import CanopyError, store


@pytest.fixture
def filled(tmp_path, chain, canopy) -> Path:
    """A store with one complete run."""
    prompts = write_prompts(tmp_path / "good.jsonl", "a", "b")
    assert canopy(*ingest_arguments(tmp_path / "s", chain, prompts, samples=4))[0] == 0
    return tmp_path / "s"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"text": "a"}\n\n{"text": "b"}\n', "line 2: empty line; remove it"),
        ('{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ('{"text": "a"}\n{"text": "b"}\n{"text": "a"}\n', "line 3: the same prompt as line 1"),
        ('["a"]\n', "line 1: needs an object"),
        ('{"text": ""}\n', "line 1: needs text"),
        ('{"text": 3}\n', "line 1: needs text"),
        ('{"messages": [{"role": "user"}]}\n', "line 1: messages needs a list"),
        ('{"text": "\\ud800"}\n', "line 1: holds half a surrogate pair"),
        ("", "holds no prompts"),
        ("\n\n", "holds no prompts"),
    ],
)
def test_bad_prompt_files(tmp_path, chain, canopy, lines, message):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(lines)
    refused(canopy(*ingest_arguments(tmp_path / "s", chain, prompts)), 1, str(prompts), message)
    assert not (tmp_path / "s").exists()


def test_bytes_that_are_no_text(tmp_path, chain, canopy):
    prompts = tmp_path / "p.jsonl"
    prompts.write_bytes(b'{"text": "\xff\xfe"}\n')
    refused(canopy(*ingest_arguments(tmp_path / "s", chain, prompts)), 1, "line 1: not JSON")


def test_a_prompt_longer_than_the_context_window(tmp_path, chain, canopy):
    prompts = write_prompts(tmp_path / "p.jsonl", "a", "b " * 600)
    result = canopy(*ingest_arguments(tmp_path / "s", chain, prompts))
    refused(
        result,
        1,
        "line 2: 600 prompt tokens and 60 new ones exceed the context window of 512",
        "shorten the prompt or lower --max-new-tokens",
    )


@pytest.mark.parametrize("what", ["nan", "inf"])
def test_logits_that_are_not_finite(tmp_path, canopy, what):
    import torch
    from transformers import AutoModelForCausalLM

    folder = save_chain(tmp_path / "model", np.where(np.arange(8) == 3, 9.0, CHAIN_LOGITS))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        if what == "nan":
            model.model.embed_tokens.weight[3] = float("nan")
        else:
            model.lm_head.weight[2, 3] = 3e38  # overflows to +inf once state c is reached
    model.save_pretrained(folder)
    prompts = write_prompts(tmp_path / "p.jsonl", "a")
    result = canopy(*ingest_arguments(tmp_path / "s", folder, prompts, samples=3))
    refused(result, 1, "p.jsonl: line 1, sample ", "step 2: the model's logits are NaN or infinite")
    assert len(canopy_store.read(tmp_path / "s", "rollouts", incomplete=True)) == 0


def test_too_little_memory_for_a_single_rollout(tmp_path, chain, canopy, monkeypatch):
    from canopy_store.ingest import shared_prompt

    def full(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    prompts = write_prompts(tmp_path / "p.jsonl", "a")
    arguments = ingest_arguments(tmp_path / "s", chain, prompts, samples=3, **{"batch-size": 1})
    with monkeypatch.context() as patch:
        patch.setattr(shared_prompt.Slots, "step", full)
        refused(canopy(*arguments), 1, "p.jsonl: line 1: out of memory at one rollout at a time; lower")
    assert canopy(*arguments)[0] == 0


def test_a_model_without_an_end_token(tmp_path, canopy):
    folder = save_chain(tmp_path / "model", eos=False)
    prompts = write_prompts(tmp_path / "p.jsonl", "a")
    arguments = ingest_arguments(tmp_path / "s", folder, prompts, samples=2)
    refused(canopy(*arguments), 1, "no end-of-sequence token", "--eos-token-id", "--no-eos")
    assert canopy(*arguments, "--no-eos")[0] == 0
    endless = canopy_store.read(tmp_path / "s", "rollouts")
    assert endless["n_tokens"].to_list() == [60, 60]
    assert endless["finish_reason"].to_list() == ["length", "length"]
    assert canopy(*arguments, "--eos-token-id", 0, "--run", "named")[0] == 0
    frame = canopy_store.read(tmp_path / "s", "rollouts").filter(run_id="named")
    assert max(max(row) for row in frame["eos_logprob"].to_list()) > -np.inf


def test_a_tokenizer_without_padding_is_no_obstacle(filled):
    tokenizer = canopy_store.read(filled, "rollouts")
    assert len(tokenizer) == 8  # the chain's tokenizer has no padding token at all


def golden_row(**changes: object) -> dict[str, object]:
    return {
        "family": "f",
        "variant": "v",
        "task": "t",
        "prompt_id": "p",
        "sample": 0,
        "entropy": [0.5, 0.25],
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entropy": []}, "row 1: a rollout of no tokens has no entropy rate"),
        ({"entropy": [0.5, float("nan")]}, "row 1: entropy at step 2 is nan"),
        ({"entropy": [-1.0]}, "row 1: entropy at step 1 is -1.0"),
        ({"entropy": None}, "row 1: entropy is missing"),
        ({"logprob": [-0.5]}, "row 1: logprob and entropy differ in length"),
        ({"logprob": [-0.5, 0.5]}, "row 1: logprob at step 2 is 0.5"),
        ({"logprob": [-0.5, float("-inf")]}, "row 1: logprob at step 2 is -inf"),
        ({"eos_logprob": [-0.5, float("nan")]}, "row 1: eos_logprob at step 2 is nan"),
        ({"sample": 0}, "row 0: prompt p sample 0 of f v t is there twice"),
        ({"prompt_id": None}, "row 1: prompt_id is missing"),
        ({"finish_reason": "eos"}, "row 1: finish_reason 'eos': needs stop or length"),
        ({"embedding": [0.0, 0.0]}, "prompt p sample 1: its embedding is zero or not finite"),
        ({"embedding": [1.0]}, "row 1: embedding is missing or of another length"),
    ],
)
def test_bad_imports(tmp_path, canopy, changes, message):
    first = {
        "logprob": [-0.1, -0.2],
        "eos_logprob": [-1.0, -2.0],
        "embedding": [1.0, 0.0],
        "finish_reason": "stop",
    }
    first = {key: first[key] for key in changes if key in first}
    rows = [golden_row(**first), golden_row(**{"sample": 1, **changes})]
    schema = {"entropy": pl.List(pl.Float64), "prompt_id": pl.String}
    file = tmp_path / "in.parquet"
    pl.DataFrame(rows, schema_overrides=schema).write_parquet(file)
    refused(canopy("import", file, "--store", tmp_path / "s"), 1, message)
    # and a mended file imports under the same name
    good = [golden_row(), golden_row(sample=1)]
    pl.DataFrame(good).write_parquet(file)
    code, out, err = canopy("import", file, "--store", tmp_path / "s")
    assert code == 0, err
    assert "2 rollouts in 1 runs: f.v.t" in out


def test_an_import_that_lacks_a_column_or_is_no_parquet(tmp_path, canopy):
    file = tmp_path / "in.parquet"
    pl.DataFrame([golden_row()]).drop("sample").write_parquet(file)
    refused(canopy("import", file, "--store", tmp_path / "s"), 1, "missing column sample; there are")
    file.write_bytes(file.read_bytes()[:-20])
    refused(canopy("import", file, "--store", tmp_path / "s"), 1, "truncated or not a Parquet file")
    refused(canopy("import", tmp_path / "no", "--store", tmp_path / "s"), 1, "no such file")
    pl.DataFrame([golden_row(entropy="x")]).write_parquet(file)
    refused(canopy("import", file, "--store", tmp_path / "s"), 1, "needs a list of floats")


def test_the_same_import_twice_is_once_and_another_is_refused(tmp_path, canopy):
    file = tmp_path / "in.parquet"
    pl.DataFrame([golden_row()]).write_parquet(file)
    for _ in range(2):
        assert canopy("import", file, "--store", tmp_path / "s")[0] == 0
    assert len(canopy_store.read(tmp_path / "s", "rollouts")) == 1
    pl.DataFrame([golden_row(entropy=[1.0])]).write_parquet(file)
    refused(canopy("import", file, "--store", tmp_path / "s"), 1, "f.v.t", "source_sha256", "--run")
    assert canopy_store.read(tmp_path / "s", "rollouts")["entropy_sum"].to_list() == [0.75]


def test_a_truncated_file_in_the_store(filled, canopy):
    victim = store.files(filled, "rollouts")[0]
    victim.write_bytes(victim.read_bytes()[:200])
    refused(
        canopy("sql", "from model_metrics", "--store", filled),
        1,
        str(victim),
        "truncated or not a Parquet file",
    )


def test_a_lost_file_in_the_store_is_named_and_never_left_out(filled, canopy):
    victim = store.files(filled, "rollouts")[1]
    victim.unlink()
    refused(canopy("sql", "from model_metrics", "--store", filled), 1, str(victim), "lost", "verify")
    with pytest.raises(CanopyError, match="lost"):
        canopy_store.read(filled, "rollouts")


def test_what_no_record_names_is_not_shown(filled, canopy):
    before = canopy_store.read(filled, "model_metrics")
    shard = store.files(filled, "rollouts")[0]
    pq.write_table(pa.table({"x": [1]}), shard.with_name("part-00008.parquet"))
    shutil.copyfile(shard, shard.with_name("part-00009.parquet"))
    assert canopy_store.read(filled, "model_metrics").equals(before)
    assert canopy("status", "--store", filled)[0] == 0


def test_a_file_of_a_newer_schema(filled, canopy):
    victim = store.files(filled, "rollouts")[0]
    rows = pq.ParquetFile(victim).read()
    pq.write_table(rows.replace_schema_metadata({b"canopy_schema": b"rollouts:99"}), victim)
    with pytest.raises(CanopyError, match=r"schema version 99.*upgrade"):
        store.read_rows(victim)


def test_a_store_of_a_newer_version(filled, canopy):
    (filled / "canopy.json").write_text(json.dumps({"format": "canopy_store", "version": 99}))
    refused(canopy("status", "--store", filled), 1, "format version 99", "upgrade")


def test_no_store_and_not_a_store(tmp_path, chain, canopy):
    refused(canopy("status", "--store", tmp_path / "none"), 1, "no store here", "canopy init")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear to me")
    refused(canopy("init", "--store", tmp_path / "mine"), 1, "not a store and not an empty folder")


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of half a megabyte, where the system lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)], capture_output=True
    )
    if done.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(small_disk, tmp_path, chain, canopy):
    prompts = write_prompts(tmp_path / "p.jsonl", *(f"{a} {b}" for a in "abcdefg" for b in "abcdefg"))
    arguments = ingest_arguments(small_disk / "s", chain, prompts, samples=60)
    result = canopy(*arguments)
    refused(result, 1, "the disk is full", "nothing stored is lost: free some space and run it again")
    kept = len(list((small_disk / "s" / "rollouts").rglob("*.parquet")))
    assert kept > 0
    assert not list(small_disk.rglob("*.tmp"))
    shutil.copytree(small_disk / "s", tmp_path / "larger")
    arguments[arguments.index("--store") + 1] = str(tmp_path / "larger")
    assert canopy(*arguments)[0] == 0
    assert canopy(*ingest_arguments(tmp_path / "whole", chain, prompts, samples=60))[0] == 0
    whole = canopy_store.read(tmp_path / "whole", "rollouts").sort("prompt_id", "sample")
    assert canopy_store.read(tmp_path / "larger", "rollouts").sort("prompt_id", "sample").equals(whole)


def test_a_disk_that_fills_while_writing(filled, chain, canopy, monkeypatch):
    """The same where nothing can be mounted: the flush to disk fails."""

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    before = {p: p.read_bytes() for p in store.files(filled, "rollouts")}
    prompts = write_prompts(filled.parent / "more.jsonl", "c")
    monkeypatch.setattr(os, "fsync", full)
    result = canopy(*ingest_arguments(filled, chain, prompts, task="other"))
    refused(result, 1, "the disk is full")
    assert {p: p.read_bytes() for p in store.files(filled, "rollouts")} == before


def test_resuming_with_other_settings_names_each_difference(filled, chain, canopy):
    prompts = filled.parent / "good.jsonl"
    arguments = ingest_arguments(filled, chain, prompts, samples=4, temperature=0.7, seed=6)
    refused(
        canopy(*arguments),
        1,
        "run chain.base.walk is stored with other settings",
        "temperature (stored 1.0, asked 0.7)",
        "seed (stored 5, asked 6)",
        "--run",
    )


def test_another_model_under_the_same_name(filled, tmp_path, canopy):
    other = save_chain(tmp_path / "other", CHAIN_LOGITS * 2)
    arguments = ingest_arguments(filled, other, tmp_path / "good.jsonl", samples=4, run="second")
    refused(canopy(*arguments), 1, "model chain/base is stored", "weights_sha256", "--variant")


def test_pickled_weights_are_not_loaded(tmp_path, chain, canopy):
    folder = shutil.copytree(chain, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    prompts = write_prompts(tmp_path / "p.jsonl", "a")
    refused(canopy(*ingest_arguments(tmp_path / "s", folder, prompts)), 1, "only pickled weights")


def _layers(folder: Path, count: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": count}))


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        # transformers would sample from a layer of random weights
        (lambda folder: _layers(folder, 3), "no weights for model.layers."),
        (
            lambda folder: _cut(folder / "model.safetensors"),
            "cannot be loaded: Error while",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "cannot be loaded: "),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be loaded: "),
        (lambda folder: _layers(folder, "two"), "cannot be loaded: "),
        (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], "no tokenizer; save it"),
    ],
)
def test_a_model_that_is_not_whole(tmp_path, chain, canopy, spoil, message):
    folder = shutil.copytree(chain, tmp_path / "spoilt")
    spoil(folder)
    prompts = write_prompts(tmp_path / "p.jsonl", "a")
    refused(canopy(*ingest_arguments(tmp_path / "s", folder, prompts)), 1, str(folder), message)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sql"], "Missing option '--store'"),
        (["sqll"], "Did you mean 'sql'?"),
        (["status"], "Missing option '--store'"),
        (["import", "x.parquet", "--store", "s", "--max-new-tokens", "0"], "needs at least 1"),
        (["sql", "select 1", "--store", "s", "--format", "xml"], "'xml' is not one of"),
    ],
)
def test_wrong_calls(canopy, arguments, message):
    refused(canopy(*arguments), 2, message)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("temperature", -1, "needs 0 (greedy) or more"),
        ("temperature", "nan", "needs 0 (greedy) or more"),
        ("top-p", 0, "needs more than 0"),
        ("samples", 0, "needs at least 1"),
        ("family", "", "needs 1 to 200 printable characters"),
    ],
)
def test_impossible_settings(tmp_path, chain, canopy, option, value, message):
    prompts = write_prompts(tmp_path / "p.jsonl", "a")
    result = canopy(*ingest_arguments(tmp_path / "s", chain, prompts, **{option: value}))
    refused(result, 2, f"--{option}", message)


@pytest.mark.parametrize(
    ("value", "form"),
    [
        ("interval 1 day", "table"),
        ("interval 1 day", "parquet"),
        ("[{'a': interval 1 day}]", "json"),
        ("union_value(a := 1)", "csv"),
        ("340282366920938463463374607431768211455::uhugeint", "table"),
        ("timestamp 'infinity'", "table"),
        ("timestamptz '-infinity'", "json"),
        ("date 'infinity'", "csv"),
        ("date '290000-01-01'", "json"),
        ("[{'a': date 'infinity'}]", "json"),
        ("'x'::blob", "json"),
        ("map([1], [2])", "json"),
    ],
)
def test_a_value_that_cannot_be_printed_is_to_be_cast(filled, canopy, value, form):
    line = ("--store", filled, "--format", form)
    refused(canopy("sql", f"select {value} as x", *line), 2, "cannot be printed", "cast", "varchar")
    assert canopy("sql", f"select ({value})::varchar as x", "--store", filled)[0] == 0


def test_dates_that_a_calendar_has_are_printed(filled, canopy):
    query = "select date '9999-12-31' as d, timestamp '0001-01-01 00:00:00' as t, null::date as n"
    code, out, err = canopy("sql", query, "--store", filled, "--format", "csv")
    assert (code, err) == (0, "")
    assert out.splitlines()[1].startswith("9999-12-31,0001-01-01T00:00:00")


def test_a_query_reads_nothing_but_the_store(filled, tmp_path, canopy):
    secret = tmp_path / "secret.csv"
    secret.write_text("x\n1\n")
    for code, query in (
        (1, f"select * from '{secret}'"),
        (2, f"select * from read_csv('{filled}/../secret.csv')"),
        (1, f"select * from read_text('{filled}/../secret.csv')"),
        (2, f"copy (select 1) to '{tmp_path / 'out.csv'}'"),
        (2, "set enable_external_access = true"),
        (1, "select no_such_column from rollouts"),
    ):
        refused(canopy("sql", query, "--store", filled), code)
    assert not (tmp_path / "out.csv").exists()
