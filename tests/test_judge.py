"""Judges of the same meaning: chat, entailment, cosine and grades; what they store, and refuse."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from openai_server import JudgeServer, serving
from stops import stopped
from stores import refused, rollout_rows, write_parquet

import canopy_store
from canopy_store import store
from canopy_store.errors import DataError
from canopy_store.ingest.clusters import ingest_clusters, judged_samples, subsample
from canopy_store.ingest.judge import foretold, ingest_judgments
from canopy_store.ingest.judge_prompts import PROMPTS, JudgePrompts, verdict_of
from canopy_store.schema import TABLES
from canopy_store.store.embeddings import write_embeddings

RUN = "f.base.t"
# rollouts of p that mean: a, a, b, a, c; of q one alone
TEXTS = ("red cat", "cat, red", "a dog", "the cat is red", "no idea")
MEANING = {"red cat": "a", "cat, red": "a", "a dog": "b", "the cat is red": "a", "no idea": "c"}


def of_texts(root: Path, texts: tuple[str, ...] = TEXTS, variant: str = "base", **more) -> Path:
    """A store of one prompt with these texts, and of one whose only rollout is the first of them."""
    rows = rollout_rows(variant, range(1, len(texts) + 1), text=texts, prompt=["What?"] * len(texts))
    rows += [{**rows[0], "prompt_id": "q"}]
    rows = [{**row, "logprob": [-0.25] * len(row["entropy"])} for row in rows]
    file = write_parquet(root.parent / f"{root.name}-{variant}.parquet", rows)
    canopy_store.import_rollouts(root, file)
    return root


def pair_of(content: str) -> tuple[str, str]:
    """The two rollouts in what a judge reads: those of the last pair."""
    first = content.rpartition("First text: ")[2].partition("\n")[0]
    return first, content.rpartition("Second text: ")[2].partition("\n")[0]


def knows(content: str) -> str:
    first, other = pair_of(content)
    return "similar" if MEANING[first] == MEANING[other] else "different"


def judged(root: Path, judge: str = "J") -> pl.DataFrame:
    frame = canopy_store.read(root, "judgments").filter(judge=judge)
    return frame.sort("prompt_id", "sample", "other_sample")


def entropy(shares) -> float:
    return -sum(p * math.log(p) for p in shares)


# ---------------------------------------------------------------- a chat model


def test_a_chat_model_judges_each_pair_once_and_back_where_similar(tmp_path, canopy):
    root = of_texts(tmp_path / "s")
    with serving(JudgeServer, reply=knows) as server:
        call = ("ingest", "judge", "--store", root, "--judge", "J", "--method", "chat")
        code, out, err = canopy(*call, "--base-url", server.url)
        assert code == 0, err
        assert "10 pairs of 2 prompts, 11 to 21 calls" in err
        assert out.endswith("judgments as J\n")
        asked = [pair_of(body["messages"][-1]["content"]) for body in server.asked]
        assert asked[0] == (TEXTS[0], TEXTS[0])  # the probe
        alike = {(0, 1), (0, 3), (1, 3)}
        expected = [*combinations(range(5), 2), *((j, i) for i, j in alike)]
        assert Counter(asked[1:]) == Counter((TEXTS[i], TEXTS[j]) for i, j in expected)
        assert all(body["temperature"] == 0 and body["max_tokens"] == 16 for body in server.asked)
        again = len(server.asked)
        assert canopy(*call, "--base-url", server.url)[0] == 0
        assert len(server.asked) == again  # everything is there
    rows = judged(root)
    assert set(rows.select("sample", "other_sample").rows()) == set(expected)
    assert set(rows["prompt_id"]) == {"p"}
    similar = rows.filter(verdict="similar").select("sample", "other_sample").rows()
    assert set(similar) == alike | {(j, i) for i, j in alike}
    assert set(rows["status"]) == {"ok"}
    assert set(rows["reply"]) == {"similar", "different"}

    assert canopy("ingest", "cluster", "--store", root, "--judge", "J")[0] == 0
    (p, q) = canopy_store.read(root, "meaning_metrics").sort("prompt_id").to_dicts()
    assert p["clustering"] == "J.components"
    assert p["labels"] == [0, 0, 1, 0, 2]
    assert (p["n_judged"], p["n_meanings"], p["n_intransitive"]) == (5, 3, 0)
    assert p["rse"] == pytest.approx(entropy([3 / 5, 1 / 5, 1 / 5]))
    assert p["rse_norm"] == pytest.approx(p["rse"] / math.log(5))
    weights = np.exp(-0.25 * np.arange(1, 6))
    classes = [weights[[0, 1, 3]].sum(), weights[2], weights[4]] / weights.sum()
    assert p["semantic_entropy"] == pytest.approx(entropy(classes))
    assert (q["n_judged"], q["rse"], q["rse_norm"], q["semantic_entropy"]) == (1, 0, None, 0)
    assert canopy_store.verify(root, deep=True).is_empty()


def test_what_it_will_take_is_told_without_a_call(tmp_path, canopy):
    root = of_texts(tmp_path / "s")
    call = ("ingest", "judge", "--store", root, "--judge", "J", "--method", "chat", "--dry-run")
    code, out, _ = canopy(*call, "--base-url", "http://127.0.0.1:9/v1")  # nobody is there
    assert code == 0
    told = foretold(root, "J", "chat")
    whole = sum(len(JudgePrompts().of("t", "What?", a, b)) for a, b in combinations(TEXTS, 2))
    assert told.tokens == (whole // 4, whole // 4 * 2)
    assert out == f"to judge: 10 pairs of 2 prompts, 11 to 21 calls, about {whole // 4:,} to " + (
        f"{whole // 4 * 2:,} tokens to read\n"
    )
    assert judged(root).is_empty()


@pytest.mark.parametrize("reply", ["I cannot say.", "not similar", None, "similar or different", ""])
def test_a_judge_that_answers_nonsense_stores_nothing(tmp_path, canopy, reply):
    root = of_texts(tmp_path / "s")
    call = ("ingest", "judge", "--store", root, "--judge", "J", "--method", "chat", "--base-url")
    with serving(JudgeServer, reply=lambda content: reply) as server:
        said = canopy(*call, server.url)
    lines = said[2].strip().splitlines()
    refused((said[0], said[1], lines[-1]), 1, "judge J: of two identical texts")
    assert not store.files(root, "judgments")
    assert judged(root).is_empty()
    assert not list((root / "judgments").rglob("*.parquet"))

    def probe_alone(content: str) -> str | None:
        first, other = pair_of(content)
        return "similar" if first == other else reply

    with serving(JudgeServer, reply=probe_alone) as server:
        said = canopy(*call, server.url)
    lines = said[2].strip().splitlines()
    refused((said[0], said[1], lines[-1]), 1, "prompt p: 10 of 10 calls of judge J gave no verdict")
    assert not list((root / "judgments").rglob("*.parquet"))


def test_a_few_failed_calls_are_kept_as_such(tmp_path):
    texts = tuple(f"text {i}" for i in range(8))
    root = of_texts(tmp_path / "s", texts)

    def reply(content: str) -> str:
        return "?" if pair_of(content) == (texts[2], texts[5]) else "similar"

    with serving(JudgeServer, reply=reply) as server:
        ingest_judgments(root, "J", "chat", base_url=server.url)
    failed = judged(root).filter(status="failed")
    assert failed.select("sample", "other_sample", "verdict", "reply").rows() == [(2, 5, None, "?")]
    assert len(judged(root)) == 28 + 27
    ingest_clusters(root, "J")
    row = canopy_store.read(root, "meaning_metrics").filter(prompt_id="p").to_dicts()[0]
    assert (row["n_meanings"], row["n_intransitive"]) == (1, 1)


def in_shards(root: Path, monkeypatch: pytest.MonkeyPatch, prompts: str = "abcd") -> Path:
    """A store of these prompts, a shard each, with three rollouts each and their answers."""
    monkeypatch.setattr("canopy_store.readers.importing._ROLLOUTS_PER_SHARD", 3)
    texts = ["red cat", "a dog", "cat, red"]
    more = {"text": texts, "answer": ["1", "2", "1"], "prompt": ["What?"] * 3}
    rows = rollout_rows(lengths=(1, 2, 3), prompts=prompts, **more)
    canopy_store.import_rollouts(root, write_parquet(root.parent / "r.parquet", rows), grader="G")
    assert len(store.files(root, "rollouts")) == len(prompts)
    return root


def test_a_job_that_is_killed_goes_on_with_the_shards_that_are_missing(tmp_path, monkeypatch):
    root = in_shards(tmp_path / "s", monkeypatch)
    program = "import sys; from canopy_store.cli import main; sys.exit(main(sys.argv[1:]))"
    call = [sys.executable, "-c", program, "ingest", "judge", "--store", str(root)]
    call += ["--judge", "J", "--method", "chat", "--concurrency", "1", "--base-url"]
    with serving(JudgeServer, reply=knows, pause=0.05) as server:
        process = subprocess.Popen([*call, server.url], stderr=subprocess.DEVNULL)
        while len(server.asked) < 1 + 2 * 4 + 1:  # into the third of four shards
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
    stored = len(list((root / "judgments").rglob("part-*.parquet")))
    assert 2 <= stored < 4
    assert judged(root).is_empty()  # nothing is shown before all is there
    with serving(JudgeServer, reply=knows) as server:
        ingest_judgments(root, "J", "chat", base_url=server.url)
        assert len(server.asked) == 1 + 4 * (4 - stored)
        ingest_judgments(root, "unbroken", "chat", base_url=server.url)
    assert judged(root).drop("judge").equals(judged(root, "unbroken").drop("judge"))


@pytest.mark.parametrize("job", ["judge.ingest_judgments", "clusters.ingest_clusters"])
def test_a_stop_at_any_change_to_the_disk_loses_nothing(tmp_path, monkeypatch, job):
    whole = in_shards(tmp_path / "s", monkeypatch, "ab")
    more = {"judge": "A", "method": "grades", "grader": "G"}
    table = "judgments"
    if job.startswith("clusters"):
        ingest_judgments(whole, **more)
        more, table = {"judge": "A"}, "clusters"
    roots = [shutil.copytree(whole, tmp_path / f"copy{n}") for n in range(6)]
    stopped(f"canopy_store.ingest.{job}", roots[0], roots[1:], **more)
    expected = canopy_store.read(roots[0], table)
    keys = [*TABLES[table].keys]
    for root in roots[1:]:
        shown = canopy_store.read(root, table)
        assert shown.is_empty() or shown.sort(keys).equals(expected.sort(keys))
        call = ingest_judgments if table == "judgments" else ingest_clusters
        call(root, **more)
        assert canopy_store.read(root, table).sort(keys).equals(expected.sort(keys))
        assert canopy_store.verify(root, deep=True).is_empty()


def test_a_name_keeps_its_judge(tmp_path):
    root = of_texts(tmp_path / "s")
    with serving(JudgeServer, reply=knows, models=("one", "two")) as server:
        ingest_judgments(root, "J", "chat", base_url=server.url, served_model="one")
        with pytest.raises(canopy_store.ConflictError, match="model"):
            ingest_judgments(root, "J", "chat", base_url=server.url, served_model="two")
        with pytest.raises(canopy_store.ConflictError, match="instruction"):
            ingest_judgments(
                root, "J", "chat", base_url=server.url, served_model="one", instruction="math"
            )


def test_an_instruction_of_ones_own(tmp_path, canopy):
    root = of_texts(tmp_path / "s")
    own = tmp_path / "own.txt"
    own.write_text("First text: {first}\nSecond text: {second}\n{braces} of {prompt}")
    with serving(JudgeServer, reply=knows) as server:
        ingest_judgments(root, "J", "chat", base_url=server.url, instruction=str(own))
        assert server.asked[0]["messages"][0]["content"].endswith("{braces} of What?")
    call = (
        "ingest",
        "judge",
        "--store",
        root,
        "--judge",
        "K",
        "--method",
        "chat",
        "--base-url",
        "http://h",
    )
    own.write_text("{first} alone")
    refused(canopy(*call, "--instruction", own), 1, "{second}")
    refused(canopy(*call, "--instruction", tmp_path / "none"), 1, "none", "general")


def test_prompts_show_worked_pairs_of_both_kinds():
    for text in PROMPTS.values():
        assert re.findall(r"Answer: (\w+)", text) == ["similar", "different"]
        assert all(text.count(field) == 1 for field in ("{prompt}", "{first}", "{second}"))
    assert JudgePrompts().text("math") == PROMPTS["math"]
    assert JudgePrompts().text("poems") == PROMPTS["general"]
    assert "{first}" in JudgePrompts().of("math", "{first}", "a", "b")  # of a prompt it stays


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("similar", "similar"),
        (" Different.\n", "different"),
        ("**Similar**", "similar"),
        ("Answer: similar", "similar"),
        ("They differ in tone.\n\nVerdict: different", "different"),
        ("<think>similar?</think>different", "different"),
        ("not similar", None),
        ("dissimilar", None),
        ("They are similar", None),
        ("similar\nI think", None),
        ("", None),
        ("similar/different", None),
    ],
)
def test_a_reply_holds_a_verdict_where_its_last_line_is_one(reply, verdict):
    assert verdict_of(reply) == verdict


# ---------------------------------------------------------------- an entailment model


@pytest.fixture(scope="module")
def nli(tmp_path_factory) -> Path:
    """A tiny random entailment model, whose head prefers entailment."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *sorted({w for t in TEXTS for w in re.findall(r"\w+", t)}),
    ]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    folder = tmp_path_factory.mktemp("nli")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        initializer_range=1.0,
        id2label={0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"},
        label2id={"CONTRADICTION": 0, "NEUTRAL": 1, "ENTAILMENT": 2},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def logits_of(folder: Path, first: str, other: str) -> np.ndarray:
    """The model's probabilities of a pair that is read alone."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(**tokenizer(first, other, return_tensors="pt")).logits[0].double().numpy()
    return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()


def with_bias(folder: Path, target: Path, label: int, by: float) -> Path:
    """A copy of the model whose logit of a label is larger."""
    from safetensors.numpy import load_file, save_file

    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"] = weights["classifier.bias"] + by * np.eye(3, dtype=np.float32)[label]
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_an_entailment_model_reads_both_directions_of_every_pair(tmp_path, nli):
    root = of_texts(tmp_path / "s")
    itself = logits_of(nli, TEXTS[0], TEXTS[0])
    # as much towards entailment as the probe needs
    gap = math.log(itself.max() / itself[2])
    model = with_bias(nli, tmp_path / "biased", 2, gap + 0.01)
    ingest_judgments(root, "N", "nli", model=str(model), batch_size=3, device="cpu")
    rows = judged(root, "N").to_dicts()
    assert len(rows) == 20
    names = ("contradiction", "neutral", "entailment")
    for row in rows:
        shares = logits_of(model, TEXTS[row["sample"]], TEXTS[row["other_sample"]])
        assert row["verdict"] == names[int(shares.argmax())]
        assert row["probability"] == pytest.approx(shares.max(), abs=1e-5)
        assert row["reply"] is None
    assert len({row["verdict"] for row in rows}) > 1
    assert foretold(root, "M", "nli").calls == (21, 21)
    # one set of verdicts, three clusterings beside each other
    names = [ingest_clusters(root, "N", method) for method in ("components", "strict", "loose")]
    assert set(canopy_store.read(root, "clusters")["clustering"]) == set(names)


def test_an_entailment_model_that_tells_identical_texts_apart_is_refused(tmp_path, canopy, nli):
    root = of_texts(tmp_path / "s")
    model = with_bias(nli, tmp_path / "biased", 0, 1000.0)
    call = ("ingest", "judge", "--store", root, "--judge", "N", "--method", "nli", "--device", "cpu")
    code, out, err = canopy(*call, "--model", model)
    refused((code, out, err.strip().splitlines()[-1]), 1, "two identical texts it said contradiction")
    config = json.loads((model / "config.json").read_text())
    config["id2label"] = {"0": "A", "1": "B", "2": "C"}
    config["label2id"] = {"A": 0, "B": 1, "C": 2}
    (model / "config.json").write_text(json.dumps(config))
    code, out, err = canopy(*call, "--model", model)
    refused((code, out, err.strip().splitlines()[-1]), 1, "its labels are a, b, c")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    code, out, err = canopy(*call, "--model", model)
    refused((code, out, err.strip().splitlines()[-1]), 1, "safetensors")
    assert not list((root / "judgments").rglob("*.parquet"))


# ---------------------------------------------------------------- what is stored already


def test_cosines_over_a_threshold_are_similar(tmp_path, canopy):
    root = of_texts(tmp_path / "s")
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(6, 3))
    frame = canopy_store.read(root, "rollouts").sort("prompt_id", "sample")
    files = write_embeddings(
        root, "E", RUN, 0, frame["prompt_id"].to_list(), frame["sample"].to_list(), vectors
    )
    store.plan(root, "embedder", "E", {"embedder": "E"})
    store.commit(root, "embeddings", {"embedder": "E", "run": RUN}, files, {"embedder": "E"})
    call = ("ingest", "judge", "--store", root, "--judge", "C", "--method", "cosine", "--embedder")
    assert canopy(*call, "E", "--threshold", 0.3)[0] == 0
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similar = {(i, j) for i in range(5) for j in range(5) if i != j and unit[i] @ unit[j] >= 0.3}
    rows = judged(root, "C")
    assert set(rows.filter(verdict="similar").select("sample", "other_sample").rows()) == similar
    assert 0 < len(similar) < 20
    code, out, err = canopy(*call[:5], "D", *call[6:], "F", "--threshold", 0.3)
    refused((code, out, err.strip().splitlines()[-1]), 1, "no embeddings by F", "canopy ingest embed")


def test_equal_graded_answers_are_similar(tmp_path):
    root = tmp_path / "s"
    rows = rollout_rows(lengths=(1, 2, 3, 4, 5), answer=["4", None, " 4", "5", None])
    canopy_store.import_rollouts(root, write_parquet(tmp_path / "r.parquet", rows), grader="G")
    ingest_judgments(root, "A", "grades", grader="G")
    similar = judged(root, "A").filter(verdict="similar").select("sample", "other_sample").rows()
    assert set(similar) == {(0, 2), (2, 0)}
    ingest_clusters(root, "A")
    assert canopy_store.read(root, "meaning_metrics")["labels"].to_list() == [[0, 1, 0, 2, 3]]
    with pytest.raises(DataError, match="no grades by H"):
        ingest_judgments(root, "B", "grades", grader="H")


# ---------------------------------------------------------------- calls that are wrong, and names


@pytest.mark.parametrize(
    ("method", "more", "said"),
    [
        ("chat", (), "needs --base-url"),
        ("nli", (), "needs --model"),
        ("cosine", ("--embedder", "E"), "needs --threshold"),
        ("grades", ("--grader", "G", "--threshold", 0.5), "--threshold: only with --method cosine"),
        ("chat", ("--base-url", "http://h", "--concurrency", 0), "--concurrency 0"),
        ("grades", ("--grader", "G", "--subsample", 1), "--subsample 1"),
    ],
)
def test_a_wrong_call_is_one_line(tmp_path, canopy, method, more, said):
    root = of_texts(tmp_path / "s")
    refused(
        canopy("ingest", "judge", "--store", root, "--judge", "J", "--method", method, *more), 2, said
    )


def test_clusters_need_a_judge(tmp_path, canopy):
    root = of_texts(tmp_path / "s")
    refused(canopy("ingest", "cluster", "--store", root, "--judge", "J"), 1, "no run is judged by it")


def test_which_rollouts_are_judged_follows_from_the_prompt_s_place(tmp_path):
    root = tmp_path / "s"
    rows = rollout_rows(lengths=[2] * 30, prompts=("10", "9", "2"))
    canopy_store.import_rollouts(root, write_parquet(tmp_path / "r.parquet", rows))
    chosen = judged_samples(root, RUN, {"subsample": 24, "seed": 42})
    assert chosen == {p: subsample(30, 24, 42 + i) for i, p in enumerate(("2", "9", "10"))}
    assert chosen["2"] != chosen["9"]
