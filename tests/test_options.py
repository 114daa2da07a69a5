"""Options under a model: against transformers' own forward, a closed form and hand-worked accuracies."""

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
from chain import CHAIN_LOGITS, STATES
from polars.testing import assert_frame_equal
from stores import enter, refused, rewrite, tables
from tiny import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import canopy_store
from canopy_store import sql, store
from canopy_store.errors import ConflictError, DataError, StoreError
from canopy_store.ingest import options as job
from canopy_store.ingest.items import read_items
from canopy_store.ingest.option_logprobs import OptionReader, Question, held_by
from canopy_store.ingest.options import ingest_options
from canopy_store.store.items import option_rows, store_items

QUIZ = [
    ("q1", "The quick brown", [" fox", " dogs", " 13"], 0),
    ("q2", "The quick brown fox jumps over", [" lazy dogs", " 13 lazy dogs", " it"], 1),
    ("q3", "It is 7, and", [" they sleep.", " it sleeps"], 0),
    ("q4", "def f", ["(x):", " return x", "oo"], 0),
]


@pytest.fixture(autouse=True)
def _no_database(monkeypatch):
    """canopy.duckdb is none of these tests' business, and takes longer to write than all else."""
    monkeypatch.setattr(sql, "write_database", lambda root: None)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "base", 0, window=64)


def write(path: Path, items=QUIZ, **more: object) -> Path:
    lines = [
        {"item_id": name, "prompt": prompt, "options": options, "answer": answer, **more}
        for name, prompt, options, answer in items
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    return write(tmp_path / "quiz.jsonl")


def score(root: Path, model: Path, items: Path | None = None, **options: object) -> str:
    given = {"family": "tiny", "variant": "base", "task": "quiz", "batch_tokens": 24, **options}
    if items is not None:
        given["items"] = items
    return ingest_options(root, str(model), **given)


def scores(root: Path, scorer: str = "tiny.base") -> dict[tuple[str, int], dict]:
    rows = canopy_store.read(root, "option_scores").filter(scorer_id=scorer).to_dicts()
    return {(row["item_id"], row["option"]): row for row in rows}


@torch.inference_mode()
def alone(model, ids: list[int], start: int) -> np.ndarray:
    """Log-probability of each token from ``start`` on, by one forward pass of the whole sequence."""
    logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return np.array([logprobs[at - 1, ids[at]].item() for at in range(start, len(ids))])


# ---------------------------------------------------------------- exact


@pytest.mark.parametrize("context", [None, "Foxes jump over dogs.\n\nDogs are lazy and brown."])
def test_scores_are_those_of_the_models_own_forward(tmp_path, base, quiz, context):
    file = None
    if context is not None:
        file = tmp_path / "context.txt"
        file.write_text(context + "\n")
    name = score(tmp_path / "S", base, quiz, context=file, neutral="It is")
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    before = [] if context is None else ids(f"{context}\n\n")
    stored = scores(tmp_path / "S", name)
    assert len(stored) == 11
    for item_id, prompt, options, _ in QUIZ:
        for number, option in enumerate(options):
            row = stored[item_id, number]
            for said, sentence in ((row["logprob_sum"], prompt), (row["neutral_sum"], "It is")):
                # no token of these texts spans the boundary
                sequence = before + ids(sentence + option)
                expected = alone(model, sequence, len(before) + len(ids(sentence)))
                assert said == pytest.approx(expected.sum(), rel=1e-5)
            assert row["n_tokens"] == len(ids(option))
    found = canopy_store.read(tmp_path / "S", "scorers").row(0, named=True)
    assert (found["context_sha256"] is None) == (context is None)
    assert (
        found["scorer_id"]
        == name
        == ("tiny.base" if context is None else f"tiny.base.context-{found['context_sha256'][:8]}")
    )
    assert canopy_store.verify(tmp_path / "S").is_empty()


def questions(rng, context: list[int], n: int = 12) -> list[Question]:
    """Questions of several lengths; some whose options share tokens, and begin before others do."""

    def some(count: int) -> list[int]:
        return [int(i) for i in rng.integers(2, 320, count)]

    made = []
    for _ in range(n):
        stem = context + some(rng.integers(2, 7))
        made.append(Question([stem + some(rng.integers(1, 4)) for _ in range(4)], [len(stem)] * 4))
    stem = context + some(2)
    branches = [[*stem, 5, 6, 7], [*stem, 5, 6, 8], [*stem, 5], [*stem, 9, 9]]
    made.append(Question(branches, [len(stem) + 2, len(stem), len(stem), len(stem) + 1]))
    return made


@pytest.mark.parametrize("length", [0, 1, 30])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_batch_is_exact_in_float64(base, length, attention):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    model.set_attn_implementation(attention)
    rng = np.random.default_rng(length)
    asked = questions(rng, [int(i) for i in rng.integers(2, 320, length)])
    held = held_by(asked)
    assert len(held) == length
    reader = OptionReader(model, held, 40)
    room = 1e-9 if attention == "sdpa" else 1e-6  # eager attention has its softmax in float32
    for part in (asked[:5], asked[5:]):
        for question, rows in zip(part, reader.logprobs(part, ["q"] * len(part)), strict=True):
            for ids, start, row in zip(question.sequences, question.starts, rows, strict=True):
                np.testing.assert_allclose(row, alone(model, ids, start), rtol=room)
    assert reader.shares


def test_a_model_that_cannot_share_reads_whole_sequences(base, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(base)
    asked = questions(np.random.default_rng(0), [3, 4, 5])
    shared = OptionReader(model, held_by(asked), 40)
    expected = shared.logprobs(asked, ["q"] * len(asked))
    # a model that takes no notice of the mask that it is given: other questions leak in
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, attention_mask=None, **k: forward(*a, **k))
    whole = OptionReader(model, held_by(asked), 40)
    found = whole.logprobs(asked, ["q"] * len(asked))
    assert (shared.shares, whole.shares) == (True, False)
    for one, other in zip(expected, found, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_sliding_window_is_not_shared(tmp_path, base):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 4}
    model = MistralForCausalLM(MistralConfig(vocab_size=320, **sizes, **heads)).eval()
    asked = questions(np.random.default_rng(0), [3, 4, 5], 3)
    reader = OptionReader(model, held_by(asked), 40)
    found = reader.logprobs(asked, ["q"] * len(asked))
    assert reader.shares is False
    np.testing.assert_allclose(
        found[0][0], alone(model, asked[0].sequences[0], asked[0].starts[0]), atol=2e-5
    )


def test_the_markov_chain_in_closed_form(tmp_path, chain):
    items = write(tmp_path / "i.jsonl", [("w", "a b c", [" d e", " f", " d <eos>"], 0)])
    context = tmp_path / "context.txt"
    context.write_text("g g f e d")
    logp = CHAIN_LOGITS - np.log(np.exp(CHAIN_LOGITS).sum(axis=1, keepdims=True))

    def walk(*states: str) -> float:
        at = [STATES.index(s) for s in states]
        return sum(logp[a, b] for a, b in itertools.pairwise(at))

    expected = [walk("c", "d", "e"), walk("c", "f"), walk("c", "d", "<eos>")]
    after_a = [walk("a", "d", "e"), walk("a", "f"), walk("a", "d", "<eos>")]
    for file in (None, context):  # a chain knows its last state alone
        name = score(tmp_path / "S", chain, items, family="chain", context=file, neutral="e a")
        rows = [scores(tmp_path / "S", name)["w", number] for number in range(3)]
        assert [row["logprob_sum"] for row in rows] == pytest.approx(expected, rel=1e-6)
        assert [row["neutral_sum"] for row in rows] == pytest.approx(after_a, rel=1e-6)


# ---------------------------------------------------------------- tokens


def test_a_token_across_the_boundary_is_the_options(tmp_path, base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    encoder = job.Encoder(AutoModelForCausalLM.from_pretrained(base), tokenizer, "plain", job.NO_CONTEXT)
    question = encoder.after("The quick ", ["fox", "brown"], "here")
    scored = [
        tokenizer.convert_ids_to_tokens(ids[start:])
        for ids, start in zip(question.sequences, question.starts, strict=True)
    ]
    # the space goes with "f", where the vocabulary has both as one token, and else stays the prompt's
    assert scored == [["Ġf", "ox"], ["br", "ow", "n"]]
    # with nothing before it, an option stands after the token that begins a text
    question = encoder.after("", ["fox"], "here")
    assert question.sequences[0][0] == tokenizer.bos_token_id
    assert question.starts == [1]


def test_messages_go_through_the_chat_template(tmp_path, base):

    folder = shutil.copytree(base, tmp_path / "chat")
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    (folder / "chat_template.jinja").write_text(template)
    line = {
        "item_id": 1,
        "messages": [{"role": "user", "content": "fox?"}],
        "options": [" it is", " no"],
        "answer": 0,
    }
    items = tmp_path / "i.jsonl"
    items.write_text(json.dumps(line))
    examples = tmp_path / "shots.jsonl"
    examples.write_text(json.dumps({"prompt": "dogs?", "completion": " lazy"}))
    assert score(tmp_path / "S", folder, items) == "tiny.base.chat"
    name = score(tmp_path / "S", folder, items, context=examples)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shots = "[user] dogs?\n[assistant]  lazy\n"
    for scorer, before in (("tiny.base.chat", ""), (name, shots)):
        prompt = f"{before}[user] fox?\n[assistant]"
        ids = tokenizer(prompt + " it is", add_special_tokens=False)["input_ids"]
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        row = scores(tmp_path / "S", scorer)["1", 0]
        assert row["logprob_sum"] == pytest.approx(alone(model, ids, start).sum(), rel=1e-5)


# ---------------------------------------------------------------- accuracies


def made_up(root: Path, items: list, sums: dict[str, list[float]], **more: dict) -> Path:
    """A store of these items, under a scorer that gives these sums; two tokens each by default."""
    root = store.init(root)
    listed = [
        option_rows(name, options, answer, prompts=["?"] * len(options), **given)
        for name, options, answer, given in items
    ]
    record = store_items(root, "t", listed)
    store.add_model(root, {"family": "f", "variant": "v"})
    scorer = {"scorer_id": "s", "model_id": "f/v", "family": "f", "variant": "v"}
    path = store.shard_path(store.folder(root, "scorers", scorer_id="s"), 0)
    store.write_rows(path, "scorers", {key: [value] for key, value in scorer.items()})
    store.commit(root, "scorers", {"scorer_id": "s"}, [path], {})
    rows = [row for item in listed for row in item]
    columns = {
        "item_id": [row["item_id"] for row in rows],
        "option": [row["option"] for row in rows],
        "logprob_sum": [value for row in listed for value in sums[row[0]["item_id"]]],
        **{
            name: [value for row in listed for value in values[row[0]["item_id"]]]
            for name, values in more.items()
        },
    }
    assert record.of("items")
    path = store.shard_path(store.folder(root, "option_scores", scorer_id="s", task="t"), 0)
    store.write_rows(path, "option_scores", columns)
    store.commit(root, "option_scores", {"scorer_id": "s", "task": "t"}, [path], {})
    return root


def test_accuracies_of_a_hand_worked_case(tmp_path):
    forward, back = ({"split": s, "cluster": c} for s, c in (("forward", "A"), ("back", "A")))
    other = {"split": "forward", "cluster": "B"}
    items = [
        ("1", [" ab", " abcdefgh"], 0, forward),
        ("2", [" ab", " cdef", " gh", " ij"], 1, forward),
        ("3", [" ab", " cd"], 1, other),
        ("4", [" ab", " cd"], 0, back),
    ]
    sums = {"1": [-3.0, -4.0], "2": [-1.0, -2.0, -5.0, -6.0], "3": [-2.0, -2.0], "4": [-9.0, -1.0]}
    tokens = {"1": [1, 4], "2": [1, 4, 2, 2], "3": [1, 1], "4": [3, 1]}
    neutral = {"1": [-1.0, -9.0], "2": [-1.0, -3.0, -5.0, -5.0], "3": [-1.0, -3.0], "4": [-9.0, -0.5]}
    root = made_up(tmp_path / "S", items, sums, n_tokens=tokens, neutral_sum=neutral)
    found = {r["item_id"]: r for r in canopy_store.read(root, "item_metrics").to_dicts()}
    # sums: right, wrong, a tie of two, wrong
    assert [found[i]["correct_sum"] for i in "1234"] == [1, 0, 0.5, 0]
    # means: -3 against -1; -1, -.5, -2.5, -3; tie; -3 against -1
    assert [found[i]["correct_token"] for i in "1234"] == [0, 1, 0.5, 0]
    # letters: -1.5 against -.5; -.5, -.5, -2.5, -3 (a tie); tie; -4.5 against -.5
    assert [found[i]["correct_char"] for i in "1234"] == [0, 0.5, 0.5, 0]
    # PMI: -2 against 5; 0, 1, 0, -1; -1 against 1; 0 against -.5
    assert [found[i]["correct_pmi"] for i in "1234"] == [0, 1, 1, 1]
    assert [found[i]["margin"] for i in "1234"] == [1, -1, 0, -8]
    assert [found[i]["margin_pmi"] for i in "1234"] == [-7, 1, 2, 0.5]
    assert [found[i]["chance"] for i in "1234"] == [0.5, 0.25, 0.5, 0.5]
    rows = {r["split"]: r for r in canopy_store.read(root, "option_accuracy").to_dicts()}
    forward = rows["forward"]
    assert (forward["n_items"], forward["n_clusters"]) == (3, 2)
    assert forward["chance"] == pytest.approx(1.25 / 3)
    assert forward["accuracy_sum"] == pytest.approx(0.5)
    # deviations by cluster: A (1 - .5) + (0 - .5) = 0, B 0
    assert forward["accuracy_sum_se"] == 0
    # mean 2/3; A (0 - 2/3) + (1 - 2/3) = -1/3, B 1/3
    assert forward["accuracy_pmi"] == pytest.approx(2 / 3)
    assert forward["accuracy_pmi_se"] == pytest.approx(math.sqrt(2 * (2 / 9)) / 3)
    assert forward["margin"] == 0
    assert rows["back"]["accuracy_sum_se"] is None
    assert canopy_store.verify(root).is_empty()


def test_what_is_not_known_is_null(tmp_path):
    items = [("1", [" a", " b"], 0, {}), ("2", [" a", " b"], 1, {})]
    root = made_up(tmp_path / "S", items, {"1": [-1.0, -2.0], "2": [-1.0, -2.0]})
    row = canopy_store.read(root, "option_accuracy").row(0, named=True)
    assert (row["accuracy_sum"], row["accuracy_char"]) == (0.5, 0.5)
    assert row["accuracy_token"] is row["accuracy_pmi"] is row["accuracy_pmi_se"] is None
    assert row["accuracy_sum_se"] == pytest.approx(0.5)


# ---------------------------------------------------------------- lm-evaluation-harness

# of version 0.4.13 on the chain; tests/data/readers/README.md says how it was made
CHOICE = Path(__file__).parent / "data/readers/samples_choice_2026-11-21T11-14-57.020158.jsonl"
NAMED = ("--family", "chain", "--variant", "base")


def test_a_multiple_choice_log_as_it_stands(tmp_path, canopy):
    code, out, err = canopy("import", CHOICE, "--store", tmp_path / "S", *NAMED)
    assert (code, err) == (0, "")
    assert "acc 0.6667 in the log, correct_sum 0.6667 here" in out
    logged = [json.loads(line) for line in CHOICE.read_text().splitlines()]
    metrics = canopy_store.read(tmp_path / "S", "item_metrics").sort("item_id")
    assert metrics["correct_sum"].to_list() == [sample["acc"] for sample in logged]
    assert metrics["margin"].to_list() == [
        float(s["resps"][0][0][0]) - float(s["resps"][1][0][0]) for s in logged
    ]
    assert metrics["correct_token"].null_count() == 3
    items = canopy_store.read(tmp_path / "S", "items")
    assert items.row(0, named=True) | {"n_chars": 1} == items.row(0, named=True)
    assert items["text"].to_list() == [" a", " b"] * 3
    assert set(items["task"]) == {"choice"}
    assert canopy("import", CHOICE, "--store", tmp_path / "S", *NAMED)[0] == 0
    assert canopy_store.verify(tmp_path / "S").is_empty()
    # and it travels as any other
    canopy_store.pull(canopy_store.export(tmp_path / "S", tmp_path / "out"), tmp_path / "T")
    assert tables(tmp_path / "T") == tables(tmp_path / "S")


def sample(number: int, target: object, options: list[str], sums: list[float], **more: object) -> dict:
    """A logged sample in the published form."""
    return {
        "doc_id": number,
        "doc": {},
        "target": str(target),
        "arguments": {
            f"gen_args_{at}": {"arg_0": more.get("prompts", ["Q:"] * 9)[at], "arg_1": option}
            for at, option in enumerate(options)
        },
        "resps": [[[str(value), "False"]] for value in sums],
        "filter": "none",
        **{key: value for key, value in more.items() if key != "prompts"},
    }


def log(path: Path, *samples: dict) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in samples))
    return path


def test_accuracies_are_the_harnesss(tmp_path, canopy):
    rng = np.random.default_rng(0)
    samples = []
    for number in range(40):
        texts = [" " + "x" * int(n) for n in rng.choice(9, 4, replace=False) + 1]
        sums, bare = (-rng.uniform(1, 9, 4) for _ in range(2))
        gold = int(rng.integers(4))
        # as process_results of the harness has them, lengths being those without the delimiter
        lengths = np.array([len(text) - 1 for text in texts])
        chosen = {"acc": sums, "acc_norm": sums / lengths, "acc_mutual_info": sums - bare}
        metrics = {name: float(values.argmax() == gold) for name, values in chosen.items()}
        texts, values = texts * 2, [*sums, *bare]
        samples.append(sample(number, gold, texts, values, **metrics))
    file = log(tmp_path / "samples_made-up_2026-11-21T11-14-57.020158.jsonl", *samples)
    out = canopy("import", file, "--store", tmp_path / "S", *NAMED)[1]
    row = canopy_store.read(tmp_path / "S", "option_accuracy").row(0, named=True)
    columns = {"acc": "sum", "acc_norm": "char", "acc_mutual_info": "pmi"}
    for name, column in columns.items():
        mean = sum(each[name] for each in samples) / 40
        assert row[f"accuracy_{column}"] == pytest.approx(mean)
        assert f"{name} {mean:.4f} in the log, correct_{column} {mean:.4f} here" in out
    assert (row["task"], row["n_items"]) == ("made-up", 40)


def test_what_tells_the_right_option(tmp_path):
    of_two = {"prompts": ["A is", "B is"], "acc": 0.0}
    file = log(
        tmp_path / "log.jsonl",
        sample(0, "dog", [" cat", " dog"], [-1.0, -2.0]),  # a text
        sample(1, 1, [" 1", " 0"], [-1.0, -2.0]),  # a number is one, even of options that are numbers
        sample(2, "so.", [" so.", " so."], [-1.0, -2.0], **of_two),  # a prompt an option: acc alone
    )
    canopy_store.import_options(tmp_path / "S", file, family="f", variant="v", task="t")
    found = canopy_store.read(tmp_path / "S", "items").filter(correct=True).sort("item_id")
    assert found["option"].to_list() == [1, 1, 1]
    assert found["prompt"].to_list()[2] == "B is"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"target": "bird"}, "line 1: target 'bird' is neither the number nor text of one option"),
        ({"target": [0, 1]}, "line 1: 2 right options"),
        ({"resps": [[["-1", "False"]]]}, "line 1: 2 arguments and 1 resps"),
        ({"resps": [[["x", "False"]], [["-1", "False"]]]}, "needs a log-probability for each answer"),
        ({"resps": [[["nan", "False"]], [["-1", "False"]]]}, "resps holds nan"),
    ],
)
def test_a_log_that_cannot_be_read(tmp_path, canopy, more, said):
    file = log(tmp_path / "log.jsonl", {**sample(0, 0, [" cat", " dog"], [-1.0, -2.0]), **more})
    result = canopy("import", file, "--store", tmp_path / "S", *NAMED, "--task", "t")
    refused(result, 1, "log.jsonl", said)
    refused(canopy("import", file, "--store", tmp_path / "S", "--task", "t"), 2, "--family")
    assert not (tmp_path / "S").exists()


# ---------------------------------------------------------------- as a job


def without(root: Path, **columns: object) -> dict[str, list[dict]]:
    """Every table, less what a clock or a place gives."""
    clocks = {"seconds", "host", "source"}
    return {
        name: [{k: v for k, v in row.items() if k not in clocks} for row in rows]
        for name, rows in tables(root).items()
    }


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("canopy_store.store.items._ITEMS", 1)


def test_a_broken_job_resumes_to_the_same_tables(tmp_path, base, quiz, small_shards, monkeypatch):
    score(tmp_path / "whole", base, quiz, neutral="It is")
    whole, calls = job._score, []

    def broken(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(job, "_score", broken)
    with pytest.raises(KeyboardInterrupt):
        score(tmp_path / "S", base, quiz, neutral="It is")
    assert canopy_store.read(tmp_path / "S", "option_scores").is_empty()
    assert canopy_store.verify(tmp_path / "S")["harmless"].all()
    score(tmp_path / "S", base, quiz, neutral="It is")
    assert len(calls) == 5  # four shards, one of them twice
    assert without(tmp_path / "S") == without(tmp_path / "whole")
    score(tmp_path / "S", base, neutral="It is")  # done, and the items need no file any more
    assert len(calls) == 5


def test_jobs_share_the_shards(tmp_path, base, quiz, small_shards):
    for part in ("2/2", "1/2"):
        assert not (tmp_path / "S" / "commits" / "option_scores").exists()
        score(tmp_path / "S", base, quiz, shard=part)
    assert len(scores(tmp_path / "S")) == 11
    work = canopy_store.read(tmp_path / "S", "work")
    assert set(work["run_id"]) == {"quiz"}
    assert work["tokens"].sum() == sum(r["n_tokens"] for r in scores(tmp_path / "S").values())
    assert canopy_store.verify(tmp_path / "S").is_empty()


def test_other_items_and_settings_are_refused(tmp_path, base, quiz):
    score(tmp_path / "S", base, quiz)
    with pytest.raises(ConflictError, match=r"neutral \(stored None, asked 'It is'\)"):
        score(tmp_path / "S", base, quiz, neutral="It is")
    changed = [("q1", "The quick brown", [" fox", " dogs", " 14"], 0), *QUIZ[1:]]
    with pytest.raises(ConflictError, match=r"item q1 has another text of option 2; give it another"):
        score(tmp_path / "S", base, write(quiz, changed))
    with pytest.raises(ConflictError, match="1 stored ones are not here, first q4"):
        score(tmp_path / "S", base, write(quiz, QUIZ[:3]))
    with pytest.raises(StoreError, match="--task other: no items of this task are stored"):
        score(tmp_path / "S", base, task="other")


def test_parquet_holds_the_same_items(tmp_path, quiz):
    rows = [json.loads(line) for line in quiz.read_text().splitlines()]
    file = tmp_path / "quiz.parquet"
    pl.DataFrame(rows).write_parquet(file)

    def stored(path: Path) -> list:
        return [[{**row, "where": None} for row in item] for item in read_items(path)]

    assert stored(file) == stored(quiz)
    assert [row["correct"] for row in read_items(file)[1]] == [False, True, False]


BAD = {
    "no right option; give its number": {"answer": None},
    "no right option: answer 2, and options are 0 to 1": {"answer": 2},
    "2 right options": {"answer": [0, 1]},
    "answer needs the number": {"answer": " fox"},
    "options 0 and 1 are the same": {"options": [" fox", " fox"]},
    "option 1 is empty": {"options": [" fox", ""]},
    "1 options, needs two or more": {"options": [" fox"]},
    "options needs a list of texts": {"options": "fox"},
    "has both prompt and messages": {"messages": [{"role": "user", "content": "?"}]},
    "has neither prompt and messages": {"prompt": None},
    "cluster needs text or a whole number": {"cluster": 0.5},
    "holds half a surrogate pair": {"prompt": "\ud800"},
    "item_id q1 is that of line 1 too": {"item_id": "q1"},
}


@pytest.mark.parametrize("said", BAD)
def test_a_line_that_is_no_item(tmp_path, said, canopy):
    good = {"item_id": "q1", "prompt": "The", "options": [" fox", " dogs"], "answer": 0}
    lines = [good, {**good, "item_id": "q2", **BAD[said]}]
    file = tmp_path / "bad.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=f"bad.jsonl: line 2: {said}"):
        read_items(file)


def test_bad_input_is_one_line_and_leaves_no_store(tmp_path, base, chain, quiz, canopy):
    def call(items: Path, *more: object, model: Path = base) -> tuple[int, str, str]:
        named = ("--family", "f", "--variant", "v", "--task", "t", "--store", tmp_path / "S")
        return canopy("ingest", "options", "--model", model, *named, "--items", items, *more)

    # to the chain's tokenizer white space is nothing
    blank = write(tmp_path / "blank.jsonl", [("q", "a b", [" c", "  "], 0)])
    refused(call(blank, model=chain), 1, "blank.jsonl: line 1: the tokenizer makes no token of option 1")
    bare = write(tmp_path / "bare.jsonl", [("q", "", ["c", "d"], 0)])
    refused(call(bare, model=chain), 1, "bare.jsonl: line 1: nothing stands before an option")
    long = write(tmp_path / "long.jsonl", [("q", "fox " * 80, [" c", " d"], 0)])
    refused(call(long), 1, "long.jsonl: line 1: context, prompt and option have", "window holds 64")
    refused(call(quiz, "--template", "chat"), 2, "--template chat: the tokenizer has no chat template")
    context = tmp_path / "context.jsonl"
    context.write_text('{"text": "a"}\n{"prompt": "a", "completion": "b"}')
    refused(call(quiz, "--context", context), 1, "context.jsonl: line 2: an example among documents")
    context = tmp_path / "context.txt"
    context.write_text("\n")
    refused(call(quiz, "--context", context), 1, "context.txt: holds no text")
    assert not (tmp_path / "S").exists()


def test_options_travel(tmp_path, base, quiz, small_shards):
    root, there = tmp_path / "S", tmp_path / "T"
    context = tmp_path / "context.jsonl"
    context.write_text('{"text": "Foxes jump."}\n{"text": "Dogs sleep."}')
    score(root, base, quiz, neutral="It is")
    name = score(root, base, context=context, neutral="It is")
    folder = canopy_store.export(root, tmp_path / "out")
    for _ in range(2):
        canopy_store.pull(folder, there)
        canopy_store.merge([root], there)
    assert tables(there) == tables(root)
    for view in ("item_metrics", "option_accuracy"):
        keys = sql.source(view).splitlines()[1].removeprefix("-- keys: ").split(", ")
        one, other = (canopy_store.read(each, view).sort(keys) for each in (root, there))
        assert_frame_equal(one, other, rel_tol=1e-12)
    assert set(canopy_store.read(there, "option_accuracy")["scorer_id"]) == {"tiny.base", name}
    # without its texts a task has all of its measures, and can be scored from its file alone
    bare = canopy_store.export(root, tmp_path / "bare", text=False)
    canopy_store.pull(bare, tmp_path / "U")
    assert canopy_store.read(tmp_path / "U", "items")["text"].null_count() == 11
    measures = canopy_store.read(tmp_path / "U", "item_metrics").sort("scorer_id", "item_id")
    assert measures.equals(canopy_store.read(root, "item_metrics").sort("scorer_id", "item_id"))
    with pytest.raises(DataError, match="item q1: its texts were left out by an export"):
        score(tmp_path / "U", base, name="again")
    assert score(tmp_path / "U", base, quiz, name="again") == "again"
    assert canopy_store.verify(tmp_path / "U").is_empty()


FAULTS = {
    "logprob_sum is not the sum over logprob in 1 rows, first item q1 option 0": (
        "option_scores",
        lambda c: c["logprob_sum"].__setitem__(0, -1.0),
    ),
    "logprob is not as long as n_tokens, or of no token in 1 rows, first item q1 option 1": (
        "option_scores",
        lambda c: c["n_tokens"].__setitem__(1, 7),
    ),
    "neutral_sum above 0 in 1 rows, first item q1 option 2": (
        "option_scores",
        lambda c: c["neutral_sum"].__setitem__(2, 0.5),
    ),
    "lacks 1 options, first of item q4": (
        "option_scores",
        lambda c: {name: values[:-1] for name, values in c.items()},
    ),
    "item q1 has 2 right options, needs one": (
        "items",
        lambda c: c["correct"].__setitem__(1, True),
    ),
    "item q1 lacks an option": ("items", lambda c: c["option"].__setitem__(0, 3)),
}


@pytest.fixture(scope="module")
def scored(tmp_path_factory, base) -> Path:
    folder = tmp_path_factory.mktemp("scored")
    score(folder / "S", base, write(folder / "quiz.jsonl"), neutral="It is")
    return folder / "S"


@pytest.mark.parametrize("said", FAULTS)
def test_verify_finds_a_fault(tmp_path, scored, said):
    root = Path(shutil.copytree(scored, tmp_path / "S"))
    table, change = FAULTS[said]
    (path,) = store.files(root, table)
    rewrite(path, table, change)
    enter(root, path)
    assert said in canopy_store.verify(root)["what"].to_list()


def test_verify_names_a_scorer_that_is_gone(tmp_path, scored):
    root = Path(shutil.copytree(scored, tmp_path / "S"))
    store.record(root, "scorers", scorer_id="tiny.base").path(root).unlink()
    assert "scorer tiny.base is not in scorers" in canopy_store.verify(root)["what"].to_list()


def test_items_are_compacted_told_of_and_removed(tmp_path, base, quiz, small_shards, canopy):
    root = tmp_path / "S"
    score(root, base, quiz, neutral="It is")
    before = tables(root), canopy_store.read(root, "item_metrics").sort("item_id")
    assert canopy_store.compact(root, tasks=["quiz"]) == {"task quiz": (4, 1)}
    assert len(store.files(root, "option_scores")) == 1
    assert tables(root) == before[0]
    assert canopy_store.read(root, "item_metrics").sort("item_id").equals(before[1])
    score(root, base, neutral="It is")  # done already
    score(root, base, neutral="It is", name="again")
    assert canopy_store.verify(root).is_empty()
    told = canopy("status", "--store", root)[1]
    assert "task quiz: 4 items" in told
    assert "option scorer again: 1 of 1 tasks of items" in told
    refused(canopy("compact", "--store", root, "--task", "none"), 1, "--task none: no task of this name")
    assert canopy("rm-task", "quiz", "--store", root, "--yes")[0] == 0
    assert canopy_store.read(root, "items").is_empty()
    assert canopy_store.read(root, "option_accuracy").is_empty()
    assert not list(root.rglob("task=*"))
    assert canopy_store.verify(root).is_empty()
    refused(canopy("rm-task", "quiz", "--store", root, "--yes"), 1, "quiz: no task of this name")
