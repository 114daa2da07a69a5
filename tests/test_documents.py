"""Documents under a model: against transformers' own forward, against closed forms, and as jobs."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from chain import CHAIN_LOGITS, STATES, save_chain
from polars.testing import assert_frame_equal
from stores import contents, enter, refused, rewrite, rollout_rows, tables, write_parquet
from tiny import LONG, TEXTS, WINDOW, save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import canopy_store
from canopy_store import sql, store
from canopy_store.errors import ConflictError, DataError, UsageError
from canopy_store.ingest import corpus as corpora
from canopy_store.ingest import documents as job
from canopy_store.ingest.documents import ingest_documents, token_texts, windows

# ---------------------------------------------------------------- models


@pytest.fixture(autouse=True)
def _no_database(monkeypatch):
    """canopy.duckdb is none of these tests' business, and takes longer to write than all else."""
    monkeypatch.setattr(sql, "write_database", lambda root: None)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "base", 0)


@pytest.fixture(scope="session")
def child(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "child", 1)


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return write(tmp_path / "docs.jsonl", {**TEXTS, "long": LONG})


def write(path: Path, texts: dict[str, str], **more: object) -> Path:
    lines = [{"document_id": name, "text": text, **more} for name, text in texts.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def score(root: Path, model: Path, documents: Path | None = None, **options: object) -> str:
    given = {"family": "tiny", "variant": model.name, "corpus": "C", "stride": 8, **options}
    if documents is not None:
        given["documents"] = documents
    return ingest_documents(root, str(model), **given)


def scores(root: Path) -> dict[str, dict]:
    rows = canopy_store.read(root, "document_scores").sort("scorer_id", "document_id").to_dicts()
    return {row["document_id"]: row for row in rows}


@torch.inference_mode()
def reference(folder: Path, ids: list[int], before: list[int], stride: int) -> np.ndarray:
    """Log-probability and entropy (2, N) of each token, one forward pass a token, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    sequence, found = [*before, *ids], []
    first = len(before) or 1
    for at in range(first, len(sequence)):
        begin = 0
        if at > WINDOW:  # the windows after the first end at WINDOW + stride, + 2 stride, …
            end = min(WINDOW + stride * math.ceil((at - WINDOW) / stride), len(sequence) - 1)
            begin = end - WINDOW
        logits = model(torch.tensor([sequence[begin:at]])).logits[0, -1]
        logprob = logits.log_softmax(-1)
        found.append([logprob[sequence[at]].item(), -(logprob.exp() * logprob).sum().item()])
    return np.array(found).T


# ---------------------------------------------------------------- exact


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("stride", [8, WINDOW])
def test_scores_are_those_of_the_models_own_forward(tmp_path, base, jsonl, bos, stride):
    root = tmp_path / "S"
    assert score(root, base, jsonl, bos=bos, stride=stride, batch_tokens=100) == "tiny.base"
    tokenizer = AutoTokenizer.from_pretrained(base)
    found = scores(root)
    assert len(found["long"]["token_ids"]) > 2 * WINDOW
    for name, text in {**TEXTS, "long": LONG}.items():
        row = found[name]
        assert row["token_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert "".join(row["tokens"]) == text
        expected = reference(base, row["token_ids"], [0] if bos else [], stride)
        assert row["n_tokens"] == len(row["token_ids"]) - (not bos) == expected.shape[1]
        np.testing.assert_allclose(row["logprob"], expected[0], rtol=5e-6)
        np.testing.assert_allclose(row["entropy"], expected[1], rtol=5e-6)
        assert row["logprob_sum"] == pytest.approx(expected[0].sum(), rel=1e-6)
        assert row["entropy_sum"] == pytest.approx(expected[1].sum(), rel=1e-6)
    assert canopy_store.verify(root).is_empty()


def test_the_markov_chain_against_its_closed_form(tmp_path):
    chain = save_chain(tmp_path / "chain")
    text = "  a b c a\nd e f g a b  "
    write(tmp_path / "d.jsonl", {"one": text, "single": "b"})
    root = tmp_path / "S"
    score(root, chain, tmp_path / "d.jsonl", family="chain", stride=None)
    weights = np.exp(CHAIN_LOGITS)
    chances = weights / weights.sum(axis=1, keepdims=True)
    states = [STATES.index(word) for word in text.split()]
    logprob = [math.log(chances[a, b]) for a, b in itertools.pairwise(states)]
    entropy = [-(chances[a] * np.log(chances[a])).sum() for a in states[:-1]]
    row = scores(root)["one"]
    assert row["token_ids"] == states
    assert "".join(row["tokens"]) == text
    np.testing.assert_allclose(row["logprob"], logprob, rtol=1e-5)
    np.testing.assert_allclose(row["entropy"], entropy, rtol=1e-5)
    single = scores(root)["single"]  # this tokenizer has no beginning of a sequence
    assert (single["n_tokens"], single["logprob"], single["tokens"]) == (0, [], ["b"])
    metrics = canopy_store.read(root, "document_metrics").sort("document_id")
    assert metrics["nll"].to_list() == [pytest.approx(-np.mean(logprob), rel=1e-6), None]
    n_bytes = len(text) - len("  a")
    assert metrics["bits_per_byte"][0] == pytest.approx(-sum(logprob) / n_bytes / math.log(2), rel=1e-6)
    (pooled,) = canopy_store.read(root, "perplexity").to_dicts()
    assert (pooled["n_documents"], pooled["split"]) == (2, "all")
    assert pooled["perplexity"] == pytest.approx(math.exp(-np.mean(logprob)), rel=1e-6)


@pytest.mark.parametrize("first", [1, 2])
def test_windows_score_each_token_once_with_all_the_context_that_fits(first):
    for length in range(1, 40):
        for window in (first, 5, 7):
            for stride in range(1, window + 1):
                pieces = windows(range(length), first, window, stride)
                assert [i for _, scored in pieces for i in scored] == list(range(first, length))
                for context, scored in pieces:
                    whole = [*context, *scored]
                    assert whole == list(range(whole[0], whole[-1] + 1))
                    assert len(context) >= 1
                    assert len(whole) - 1 == min(window, whole[-1])


def test_token_texts_are_the_text_whatever_the_tokenizer_leaves_out(base, tmp_path):
    split = AutoTokenizer.from_pretrained(save_chain(tmp_path / "chain"))
    assert token_texts(split, " a  b\n") == ([1, 2], [" a", "  b\n"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids, parts = token_texts(tokenizer, "é🙂")
    assert len(ids) == len(parts) > 2
    assert "".join(parts) == "é🙂"


# ---------------------------------------------------------------- views


def test_contributions_of_token_types_sum_to_the_total(tmp_path, base, child, jsonl):
    root = tmp_path / "S"
    score(root, base, jsonl)
    score(root, child)
    rows = canopy_store.read(root, "token_type_contributions")
    assert set(rows["scorer_id"]) == {"tiny.child"}
    assert set(rows["baseline_id"]) == {"tiny.base"}
    assert {"newline", "number", "punctuation", "function word", "content"} <= set(rows["token_type"])
    pooled = canopy_store.read(root, "perplexity").sort("scorer_id")
    change = pooled["nll"][1] - pooled["nll"][0]
    assert rows["contribution"].sum() == pytest.approx(change, abs=1e-9)
    assert rows["total"].to_list() == [pytest.approx(change, abs=1e-9)] * len(rows)
    assert rows["n_tokens"].sum() == pooled["n_tokens"][0]
    assert (rows["delta_nll"] * rows["n_tokens"]).sum() / pooled["n_tokens"][0] == pytest.approx(change)
    with canopy_store.open(root) as con:
        own = con.sql(
            "from token_type_contributions_by([{'type': 'digit', 'pattern': '.*[0-9].*'},"
            " {'type': 'letters', 'pattern': '[a-z ]+'}])"
        ).pl()
    assert set(own["token_type"]) == {"digit", "letters", "rest"}
    assert own["contribution"].sum() == pytest.approx(change, abs=1e-9)


@pytest.mark.parametrize(
    ("token", "kind"),
    [
        ("\n\n", "newline"),
        (" \n  ", "newline"),
        ("    ", "space"),
        (" 1,000", "number"),
        ("½", "number"),
        (" —", "punctuation"),
        ("):", "punctuation"),
        (" The", "function word"),
        ("don't", "function word"),
        (" fox", "content"),
        ("東京", "content"),
        ("", "rest"),
        ("x1", "rest"),
        (".\n", "punctuation"),
    ],
)
def test_the_type_of_a_token(tmp_path_factory, token, kind):
    root = canopy_store.init(tmp_path_factory.getbasetemp() / "empty")
    with canopy_store.open(root) as con:
        assert con.execute("select token_type(?)", [token]).fetchone() == (kind,)


def test_the_standard_error_of_the_pooled_nll_is_that_of_clusters(tmp_path, base):
    lines = [
        {"text": text, "split": "test", "cluster": cluster}
        for text, cluster in (("The fox", "a"), ("lazy dogs sleep", "a"), ("café", "b"), ("x + 1", "c"))
    ]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    score(tmp_path / "S", base, path)
    (row,) = canopy_store.read(tmp_path / "S", "perplexity").to_dicts()
    metrics = canopy_store.read(tmp_path / "S", "document_metrics")
    sums = metrics.group_by("cluster").agg(pl.col("nll_sum", "n_tokens").sum())
    rest = (sums["nll_sum"] - row["nll"] * sums["n_tokens"]).to_numpy()
    assert (row["n_clusters"], row["n_documents"], row["split"]) == (3, 4, "test")
    assert row["nll_se"] == pytest.approx(math.sqrt(1.5 * (rest**2).sum()) / sums["n_tokens"].sum())


def test_backward_transfer_against_a_matrix_worked_by_hand(tmp_path):
    """Stages base → one → two, corpora one and two: R is set by hand, through the stored sums."""
    root = tmp_path / "S"
    nll = {("base", "one"): 5.0, ("base", "two"): 6.0, ("one", "one"): 2.0, ("one", "two"): 5.5}
    nll |= {("two", "one"): 3.5, ("two", "two"): 1.0}
    parent = None
    models = {v: save_tiny(tmp_path / v, n) for n, v in enumerate(("base", "one", "two"))}
    for variant, model in models.items():
        for name in ("one", "two"):
            path = write(tmp_path / f"{name}.jsonl", {name: f"The {name} fox"})
            score(root, model, path, corpus=name, parent=parent)
            keys = {"scorer_id": f"tiny.{variant}", "corpus": name}
            file = root / store.record(root, "document_scores", **keys).of("document_scores")[0]
            value = -nll[variant, name]

            def change(columns, value=value):
                columns["logprob"] = [[value] * n for n in columns["n_tokens"]]
                columns["logprob_sum"] = [value * n for n in columns["n_tokens"]]

            rewrite(file, "document_scores", change)
            enter(root, file)
        parent = f"tiny/{variant}"
    frame = canopy_store.read(root, "forgetting")
    assert len(frame) == 2 * 3  # base ← one, one ← two, base ← two
    assert set(frame.filter(variant="two", ancestor_variant="base")["distance"]) == {2}
    after = frame.filter(variant="two", ancestor_variant="one", corpus="one")
    assert after["transfer"].to_list() == [pytest.approx(-1.5)]  # BWT of two stages: R[2, 1] - R[1, 1]
    with canopy_store.open(root) as con:
        bwt = con.sql("select avg(transfer) from forgetting where corpus = ancestor_variant").pl()
    assert bwt.rows() == [(pytest.approx(-1.5),)]
    first = frame.filter(variant="one", ancestor_variant="base").sort("corpus")
    assert first["transfer"].to_list() == [pytest.approx(3.0), pytest.approx(0.5)]


# ---------------------------------------------------------------- jobs


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(corpora, "_DOCUMENTS", 2)


def all_but_work(root: Path) -> dict[str, list]:
    return {name: rows for name, rows in tables(root).items() if name != "work"}


def test_a_job_that_broke_off_gives_the_same_tables(tmp_path, base, jsonl, small_shards, monkeypatch):
    whole, broken = tmp_path / "A", tmp_path / "B"
    score(whole, base, jsonl)
    assert len(store.files(whole, "document_scores")) == 2
    scored, calls = job._score, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return scored(*arguments)

    monkeypatch.setattr(job, "_score", failing)
    with pytest.raises(KeyboardInterrupt):
        score(broken, base, jsonl)
    assert canopy_store.read(broken, "document_scores").is_empty()
    problems = canopy_store.verify(broken)
    assert problems["harmless"].all()
    assert "document_scorer tiny.base, which is not done with corpus C" in problems["what"][0]
    score(broken, base)  # the corpus is stored
    assert len(calls) == 3
    assert all_but_work(broken) == all_but_work(whole)
    assert canopy_store.verify(broken).is_empty()
    before = contents(broken)
    score(broken, base, jsonl)
    assert contents(broken) == before
    work = canopy_store.read(broken, "work")
    assert work.select("run_id", "kind", "name").unique().rows() == [
        ("C", "document_scores", "tiny.base")
    ]
    assert work["tokens"].sum() == sum(len(row["token_ids"]) for row in scores(broken).values())


def test_shards_of_an_array_give_the_same_tables(tmp_path, base, jsonl, small_shards):
    score(tmp_path / "A", base, jsonl)
    for part in ("2/2", "1/2"):
        score(tmp_path / "B", base, jsonl, shard=part)
    assert all_but_work(tmp_path / "A") == all_but_work(tmp_path / "B")


def test_other_documents_or_settings_of_the_same_name_are_refused(tmp_path, base, child, jsonl):
    root = tmp_path / "S"
    score(root, base, jsonl)
    other = write(tmp_path / "o.jsonl", {**TEXTS, "long": LONG + "!"})
    with pytest.raises(ConflictError, match=r"corpus C .* document long has another text"):
        score(root, base, other)
    with pytest.raises(ConflictError, match="1 of its own are not here, first long"):
        score(root, base, write(other, TEXTS))
    with pytest.raises(ConflictError, match="differs by more than case"):
        score(root, base, jsonl, corpus="c")
    with pytest.raises(ConflictError, match=r"stride \(stored 8, asked 4\).*--name"):
        score(root, base, jsonl, stride=4)
    with pytest.raises(ConflictError, match=r"tiny/base is stored with other settings: weights_sha256"):
        score(root, child, jsonl, variant="base")
    with (
        store.holding(root, "C", key="corpus", exclusive=True),
        pytest.raises(ConflictError, match="use"),
    ):
        score(root, child)
    assert canopy_store.verify(root)["harmless"].all()


# ---------------------------------------------------------------- input


def test_a_folder_a_parquet_file_and_jsonl_are_the_same_documents(tmp_path):
    folder = tmp_path / "texts"
    for name, text in TEXTS.items():
        path = folder / "deep" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / ".hidden.txt").write_text("no")
    read = corpora.read_documents(folder)
    assert [each["document_id"] for each in read] == sorted(f"deep/{name}.txt" for name in TEXTS)
    pl.DataFrame([{k: row[k] for k in ("document_id", "text")} for row in read]).write_parquet(
        tmp_path / "d.parquet"
    )
    assert corpora.read_documents(tmp_path / "d.parquet") == read
    path = write(tmp_path / "d.jsonl", {row["document_id"]: row["text"] for row in read})
    assert corpora.read_documents(path) == read
    assert read[0]["cluster"] == read[0]["document_id"]
    assert {row["split"] for row in read} == {"all"}


BAD = {
    "no text": ('{"text": "a"}\n{"document_id": "x"}', "line 2: needs text"),
    "a number": ('{"text": 3}', "line 1: text needs to be text, not 3"),
    "empty": ('{"text": "a"}\n{"text": ""}', "line 2: an empty document"),
    "twice": (
        '{"text": "a", "document_id": 1}\n{"text": "b", "document_id": "1"}',
        "line 2: document_id 1 is that of line 1 too",
    ),
    "a list": ("[]", "line 1: not an object"),
    "no json": ('{"text": "a"}\nnot', "line 2: not JSON"),
    "blank": ('{"text": "a"}\n\n{"text": "b"}', "line 2: empty line"),
    "not utf-8": (b'{"text": "a"}\n{"text": "\xff"}', "line 2: not JSON (not UTF-8 JSON)"),
    "half a pair": ('{"text": "\\ud800"}', "line 1: holds half a surrogate pair"),
    "a split": ('{"text": "a", "split": ["x"]}', "line 1: split needs text"),
    "nothing": ("", "holds no documents"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_that_names_it(tmp_path, content, message):
    path = tmp_path / "d.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error:
        corpora.read_documents(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_folders_and_parquet_files_are_named(tmp_path):
    (tmp_path / "t").mkdir()
    with pytest.raises(DataError, match="holds no documents"):
        corpora.read_documents(tmp_path / "t")
    (tmp_path / "t" / "bad.txt").write_bytes(b"one\ntwo \xe9\n")
    with pytest.raises(DataError, match=r"bad\.txt: line 2: not UTF-8"):
        corpora.read_documents(tmp_path / "t")
    pl.DataFrame({"body": ["a"]}).write_parquet(tmp_path / "d.parquet")
    with pytest.raises(DataError, match="needs a column text, and its columns are body"):
        corpora.read_documents(tmp_path / "d.parquet")


def test_what_cannot_be_scored_is_one_line_and_leaves_no_scores(tmp_path, base, jsonl, canopy):
    root = tmp_path / "S"
    line = ["ingest", "documents", "--store", root, "--model", base, "--family", "tiny"]
    line += ["--variant", "base", "--corpus", "C"]
    refused(canopy(*line), 1, "--corpus C: no corpus of this name is stored; give its --documents")
    line += ["--documents", jsonl]
    refused(canopy(*line), 1, "document fox", "exceed the window of 32; pass --stride")
    refused(canopy(*line, "--stride", 0), 2, "--stride 0: needs at least 1")
    refused(canopy(*line, "--window", 64), 2, "--window 64: the model attends to 32 tokens at most")
    assert not root.exists()
    with pytest.raises(UsageError, match="did you mean stride"):
        score(root, base, jsonl, strid=3)
    # the line that was meant
    assert canopy(*line, "--stride", 8)[:2] == (0, f"{root}: corpus C scored as tiny.base\n")


# ---------------------------------------------------------------- travelling, and looked after


def test_an_export_and_a_pull_give_the_same(tmp_path, base, child, jsonl, small_shards):
    root, there = tmp_path / "S", tmp_path / "T"
    score(root, base, jsonl)
    score(root, child)
    folder = canopy_store.export(root, tmp_path / "out")
    for _ in range(2):
        canopy_store.pull(folder, there)
        canopy_store.merge([root], there)
    assert tables(there) == tables(root)
    assert canopy_store.verify(there).is_empty()
    score(there, child, jsonl)  # done already
    bare = canopy_store.export(root, tmp_path / "bare", text=False)
    canopy_store.pull(bare, tmp_path / "U")
    assert canopy_store.read(tmp_path / "U", "documents")["text"].null_count() == 4
    same = ("document_metrics", "perplexity")
    for view in same:
        one, other = (canopy_store.read(each, view).sort(pl.all()) for each in (root, tmp_path / "U"))
        assert_frame_equal(one, other)  # sums, to rounding: in no order of their own
    with pytest.raises(DataError, match="its text was left out"):
        score(tmp_path / "U", child, name="again")
    canopy_store.pull(folder, tmp_path / "U")
    whole, mended = tables(root), tables(tmp_path / "U")
    assert all(whole[name] == mended[name] for name in ("documents", "document_scores"))
    assert canopy_store.verify(tmp_path / "U").is_empty()


FAULTS = {
    "sum": ("logprob_sum", lambda v: v - 1e-3, "logprob_sum is not the sum over logprob"),
    "length": ("entropy", lambda v: v[:-1], "entropy is not as long as n_tokens"),
    "bound": ("logprob", lambda v: [0.5, *v[1:]], "logprob above 0"),
    "tokens": ("tokens", lambda v: [*v[:-1], v[-1] + "!"], "text has not n_bytes bytes"),
    "ids": ("token_ids", lambda v: v[:-1], "token_ids are not n_tokens, or one more"),
    "key": ("document_id", lambda v: "elsewhere", "1 rows have no document"),
}


@pytest.fixture(scope="session")
def scored(tmp_path_factory, base) -> Path:
    folder = tmp_path_factory.mktemp("scored")
    score(folder / "S", base, write(folder / "d.jsonl", TEXTS))
    return folder / "S"


@pytest.mark.parametrize(("column", "change", "what"), FAULTS.values(), ids=FAULTS)
def test_verify_names_a_planted_fault(tmp_path, scored, column, change, what):
    root = Path(shutil.copytree(scored, tmp_path / "S"))
    (path,) = store.files(root, "document_scores")

    def plant(columns):
        columns[column][0] = change(columns[column][0])

    rewrite(path, "document_scores", plant)
    enter(root, path)
    problems = canopy_store.verify(root)
    assert any(what in said for said in problems["what"]), problems["what"].to_list()
    assert "first document" in " ".join(problems["what"]) or column == "document_id"


def test_verify_names_scores_of_a_scorer_that_is_gone(tmp_path, scored):
    root = Path(shutil.copytree(scored, tmp_path / "S"))
    store.remove_record(root, store.record(root, "scorers", scorer_id="tiny.base"))
    assert "scorer tiny.base is not in scorers" in canopy_store.verify(root)["what"].to_list()


def test_a_compaction_leaves_every_row_and_jobs_go_on_after_it(
    tmp_path, base, child, jsonl, small_shards
):
    root = tmp_path / "S"
    score(root, base, jsonl)
    score(root, child, shard="1/2")
    with pytest.raises(DataError, match=r"corpus C: .* has 1 of 2 shards; finish its ingest"):
        canopy_store.compact(root)
    score(root, child)
    before = tables(root)
    assert canopy_store.compact(root) == {"corpus C": (2, 1)}
    assert canopy_store.compact(root, corpora=["C"]) == {}
    assert tables(root) == before
    assert canopy_store.verify(root).is_empty()
    score(root, base, jsonl)
    score(root, base, name="third")
    assert len(store.files(root, "document_scores")) == 3
    assert canopy_store.verify(root).is_empty()
    with pytest.raises(canopy_store.StoreError, match="--corpus D: no corpus of this name"):
        canopy_store.compact(root, corpora=["D"])


def test_a_corpus_is_told_of_removed_and_scored_again(tmp_path, base, jsonl, canopy):
    root, name = tmp_path / "S", "f.base.t"
    canopy_store.import_rollouts(root, write_parquet(tmp_path / "r.parquet", rollout_rows()))
    score(root, base, jsonl)
    score(root, base, jsonl, corpus=name)  # of a run's name
    status = canopy("status", "--store", root)[1]
    assert "corpus C: 4 documents, " in status
    assert "document scorer tiny.base: 2 of 2 corpora" in status
    canopy_store.remove_run(root, name)
    assert len(canopy_store.read(root, "document_scores")) == 8
    assert len(canopy_store.read(root, "work")) == 2
    assert canopy("rm-corpus", name, "--store", root, "--yes")[0] == 0
    refused(canopy("rm-corpus", name, "--store", root, "--yes"), 1, f"{name}: no corpus of this name")
    assert set(canopy_store.read(root, "documents")["corpus"]) == {"C"}
    assert not list(root.rglob(f"*={name}*"))
    assert canopy_store.verify(root).is_empty()
    canopy_store.remove_corpus(root, "C")
    assert canopy_store.read(root, "perplexity").is_empty()
    score(root, base, write(jsonl, TEXTS))  # other documents, once the first are gone
    assert canopy_store.verify(root).is_empty()
