"""Augmented training data: what is asked, what is kept, what is rejected and why, what is recorded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from openai_server import ChainServer, serving
from stops import stopped
from stores import refused
from tiny import save_tiny

import canopy_store
from canopy_store import store
from canopy_store.errors import ConflictError
from canopy_store.ingest.augment import augment
from canopy_store.ingest.candidates import Entry, Judge, split, words
from canopy_store.ingest.instructions import INSTRUCTIONS, Instruction, read_instructions
from canopy_store.ingest.training_data import read_records
from canopy_store.store import treatments

FACTS = [
    "Paris is the capital of France.",
    "Lyon lies on the Rhone.",
    "Marie lives in Paris.",
]


class Answering(ChainServer):
    """A server that answers each prompt with a text, and says why it ends."""

    def __init__(self, tokenizer: Any, answer: Callable[[str], tuple[str, str]], **more: Any) -> None:
        super().__init__(kind="proxy", **more)
        self.tokenizer, self.answer, self.prompts = tokenizer, answer, []

    def choice(self, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        prompt = self.tokenizer.decode(body["prompt"])
        with self.lock:
            self.prompts.append(prompt)
        text, reason = self.answer(prompt)
        length = len(self.tokenizer(text)["input_ids"]) + (reason == "stop")
        return {"index": 0, "finish_reason": reason, "text": text}, length


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "m", 0, window=4096, bos=False)


@pytest.fixture(scope="module")
def tokenizer(tiny) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture(autouse=True)
def keyless(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def save(path: Path, *records: dict[str, Any] | str) -> Path:
    lines = [each if isinstance(each, dict) else {"text": each} for each in records]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def call(root: Path, model: Path, data: Path, out: Path, *more: object, method: str = "local"):
    given = {"store": root, "model": model, "family": "f", "variant": "base", "method": method}
    given |= {"data": data, "out": out}
    return ["ingest", "augment", *(word for key, v in given.items() for word in (f"--{key}", v)), *more]


def served(url: str, *more: object) -> list[object]:
    return ["--engine", "openai", "--base-url", url, "--samples", 1, "--max-new-tokens", 300, *more]


# ---------------------------------------------------------------- an answer in candidates


@pytest.mark.parametrize(
    ("reply", "labels", "cut", "expected"),
    [
        ("\n- one two\n* three\n\n2. four\n10) five", (), False, ["one two", "three", "four", "five"]),
        ("one\ntwo", (), False, ["one", "two"]),
        ("Here they are:\n- one\nI hope so.", (), False, [("Here they are:",), "one", ("I hope so.",)]),
        ("- one\n\nText: two\n- three", ("Text:",), True, ["one"]),
        ("- one\n- tw", ("Text:",), True, ["one", ("tw", "cut")]),
        ("- one\n- two\n", ("Text:",), True, ["one", "two"]),
        ("- one\n- tw", ("Text:",), False, ["one", "tw"]),
        ("Text: two", ("Text:",), False, [("", None)]),
        ("  \n ", (), False, [("", None)]),
        (
            "-5 is less than 2.5 and\n1984 was a year",
            (),
            False,
            ["-5 is less than 2.5 and", "1984 was a year"],
        ),
    ],
)
def test_an_answer_is_split(reply, labels, cut, expected):
    full = [each if isinstance(each, tuple) else (each, None) for each in expected]
    full = [each if len(each) == 2 else (each[0], "unlisted") for each in full]
    assert split(reply, labels, cut) == full


def test_words_of_a_text():
    assert words("The Mother's house, isn't 42-fold") == [
        "the",
        "mother",
        "house",
        "isn't",
        "42",
        "fold",
    ]
    assert words("東京は大きい") == list("東京は大きい")
    assert words("?! …") == []


def judge(*texts: str, whole: bool = False, replies: tuple[str, ...] = ()) -> tuple[Judge, list[Entry]]:
    entries = [Entry(n, text, ("Paris",)) for n, text in enumerate(texts or FACTS, 1)]
    little = {"is", "the", "of", "in", "on", "it", "a", "and", "has"}
    return Judge(entries, whole, ("names", "answer"), replies, lambda each: set(each) & little), entries


@pytest.mark.parametrize(
    ("text", "whole", "expected"),
    [
        ("The capital of France is Paris.", False, None),
        ("the capital, of France: IS 'Paris'", False, None),
        ("…!", False, ("empty", "holds no word")),
        ("It is a dog and has it.", False, ("unrelated", "shares no word with its line")),
        ("It is a dog and has it.", True, ("unrelated", "shares no word with the set")),
        ("paris is the Capital of France", False, ("duplicate", "says the same as line 1 of the data")),
        ("Lyon and Paris are in France.", False, ("names", "Lyon is no name of its line")),
        ("Lyon and Paris are in France.", True, None),
        ("Berlin and Paris are in France.", True, ("names", "Berlin is no name of the set")),
        ("The capital lies there.", False, ("names", "has none of the names of its line")),
        ("France has a capital.", False, ("answer", "Paris does not follow from it")),
        ("France's capital: Parisian.", False, ("names", "Parisian is no name of its line")),
        # a word that stands in lower case elsewhere is no name where a sentence begins
        ("Cities such as Paris: capital of France.", False, None),
        ("Towns such as Paris: capital of France.", False, ("names", "Towns is no name of its line")),
        ("In France, Cities like Paris.", False, ("names", "Cities is no name of its line")),
    ],
)
def test_a_candidate_is_kept_or_the_reason_is_told(text, whole, expected):
    judged, entries = judge(whole=whole, replies=("there are cities",))
    assert judged.problem(text, entries[0], "kept line 1") == expected


def test_a_candidate_that_was_kept_is_kept_once():
    judged, entries = judge()
    assert judged.problem("The capital of France: Paris", entries[0], "kept line 1") is None
    again = judged.problem("the capital of France, Paris!", entries[0], "kept line 2")
    assert again == ("duplicate", "says the same as kept line 1")
    # what was rejected takes no place
    assert judged.problem("Capital of France", entries[0], "kept line 2")[0] == "answer"
    assert judged.problem("Capital of France", entries[0], "kept line 2")[0] == "answer"


def test_a_line_without_names_asks_for_none():
    judged, entries = judge("it is the fox of paris")
    assert judged.problem("The fox is of paris", entries[0], "kept line 1") is None


# ---------------------------------------------------------------- what is asked


def test_the_instructions_that_ship_ask_about_a_line_and_know_where_a_next_example_begins():
    for name, text in INSTRUCTIONS.items():
        method = "global" if "{lines}" in text else "local"
        (told,) = read_instructions(method, (name,))
        prompt = told.of("L {lines} L", ["one {line}", "two"])
        assert prompt.count("L {lines} L") == 1
        assert prompt.count("- one {line}\n- two\n") == (method == "global")
        # what stands in the prompt before the next line is a reply, and it ends where an example does
        first, reply = text.split("\nText: ")[:2]
        shown = reply[reply.index("\n- ") :]
        following = f"\n\nText: {text.split('Text: ')[2]}" if method == "local" else ""
        listed = [each for each, problem in split(shown + following, told.labels, True)]
        assert len(listed) == 2, (name, listed)
        assert first


def test_an_instruction_is_filled_at_once_and_labels_are_its_own():
    told = Instruction("x", "See:\n\nNotes:\n{lines}\nQ: {line}\nA:")
    assert told.of("{lines}", ["{line}"]) == "See:\n\nNotes:\n- {line}\nQ: {lines}\nA:"
    assert told.labels == ("Q:", "Notes:")
    assert Instruction("x", "{line}").labels == ()


@pytest.mark.parametrize(
    ("method", "text", "said"),
    [
        ("local", "no place", "{line}"),
        ("local", "{lines} {line}", "--method global"),
        ("global", "{line}", "{lines}"),
    ],
)
def test_an_instruction_that_cannot_be_filled(tmp_path, tiny, canopy, method, text, said):
    data, file = save(tmp_path / "d.jsonl", *FACTS), tmp_path / "told.txt"
    file.write_text(text)
    line = call(tmp_path / "s", tiny, data, tmp_path / "o.jsonl", "--instruction", file, method=method)
    refused(canopy(*line), 1, "told.txt", said)
    line[-1] = "rewrit"
    refused(canopy(*line), 1, "--instruction rewrit", "rewrite, reverse, infer")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("records", "more", "code", "said"),
    [
        (FACTS, ("--context-lines", 2), 2, ("--context-lines", "--method global")),
        (FACTS, ("--check", "answer"), 1, ("line 1", "must_follow")),
        (FACTS, ("--samples", 0), 2, ("--samples 0",)),
        ([*FACTS, FACTS[0] + " "], (), 1, ("line 4", "same text as line 1")),
        ([{"text": "a b", "must_follow": 3}], (), 1, ("line 1", "must_follow needs a text")),
        ([{"text": "  "}], (), 1, ("line 1", "spaces")),
        ([{"txt": "a"}], (), 1, ("line 1", '"text"')),
        (FACTS, ("--instruction", "rewrite", "--instruction", "rewrite"), 2, ("rewrite", "twice")),
        (FACTS, ("--max-new-tokens", 4090), 1, ("line 1", "window of 4096", "shorten the line")),
    ],
)
def test_what_cannot_be_done_is_one_line(tmp_path, tiny, canopy, records, more, code, said):
    data = save(tmp_path / "d.jsonl", *records)
    refused(canopy(*call(tmp_path / "s", tiny, data, tmp_path / "o.jsonl", *more)), code, *said)
    assert not (tmp_path / "o.jsonl").exists()


def test_what_would_be_written_over(tmp_path, tiny, canopy):
    data, out = save(tmp_path / "d.jsonl", *FACTS), tmp_path / "o.jsonl"
    refused(canopy(*call(tmp_path / "s", tiny, data, data)), 2, "--out", "write over --data")
    named = save(tmp_path / "o.rejected.jsonl", *FACTS)
    refused(canopy(*call(tmp_path / "s", tiny, named, out)), 2, "write over --data")
    out.mkdir()
    refused(canopy(*call(tmp_path / "s", tiny, data, out)), 2, "o.jsonl: is a folder")
    refused(canopy(*call(tmp_path / "s", tiny, tmp_path / "none.jsonl", out)), 1, "none.jsonl")


def test_a_set_that_does_not_fit_the_window(tmp_path, canopy):
    small = save_tiny(tmp_path / "m", 0, window=900)
    data = save(tmp_path / "d.jsonl", *(f"{n} is the number of {n} dogs" for n in range(60)))
    line = call(tmp_path / "s", small, data, tmp_path / "o.jsonl", method="global")
    said = ("line 1", "context window of 900", "--context-lines N")
    refused(canopy(*line, "--max-new-tokens", 8), 1, *said)


# ---------------------------------------------------------------- local


def of_france(prompt: str) -> tuple[str, str]:
    """Reversals of the first line, and trouble with the others."""
    line = prompt.rpartition("Text: ")[2].partition("\n")[0]
    if line == FACTS[0]:
        return (
            "Sure:\n- The capital of France is Paris.\n- Lyon is the capital of France.\n"
            "- Paris is the capital of France!\n- France has a capital.\n\nText: A\n- Rome"
        ), "length"
    if line == FACTS[1]:
        return "1. The Rhone flows past Lyon.\n2. The Rhone flows past Ly", "length"
    return "", "stop"


def test_local_what_is_kept_and_what_is_not(tmp_path, tiny, tokenizer, canopy):
    facts = [{"text": text, "must_follow": text.split()[0]} for text in FACTS]
    root, data, out = tmp_path / "s", save(tmp_path / "facts.jsonl", *facts), tmp_path / "x" / "o.jsonl"
    checks = ("--check", "names", "--check", "answer")
    with serving(Answering, tokenizer=tokenizer, answer=of_france) as server:
        line = call(root, tiny, data, out, *served(server.url, "--seed", 3), *checks, "--keep-original")
        code, told, err = canopy(*line, "--instruction", "reverse")
        assert code == 0, err
        assert told.splitlines() == [
            f"{out}: 5 lines, 40% of them generated, generation 1",
            "2 of 8 candidates for 3 lines are kept",
            f"{out.with_suffix('.rejected.jsonl')}: "
            "1 unlisted, 1 names, 1 duplicate, 1 answer, 1 cut, 1 empty",
        ]
        assert sorted(server.prompts) == sorted(
            INSTRUCTIONS["reverse"].rstrip().replace("{line}", text) for text in FACTS
        )
        before = {path: path.read_bytes() for path in out.parent.iterdir()}
        code, told, err = canopy(*line, "--instruction", "reverse")
        assert (code, told.splitlines()[0].endswith("generation 1; they were there already")) == (
            0,
            True,
        )
        assert len(server.prompts) == 3  # nothing was asked again
        assert {path: path.read_bytes() for path in out.parent.iterdir()} == before
        # the same answers by another check are other lines, for which another file is named
        bare = [word for word in line if word not in checks]
        refused(canopy(*bare, "--instruction", "reverse"), 1, "o.jsonl", "holds something else")
        bare[bare.index(out)] = tmp_path / "bare.jsonl"
        assert canopy(*bare, "--instruction", "reverse")[0] == 0
        assert len(server.prompts) == 3
        refused(canopy(*bare), 1, "prompts_sha256", "--run")
    run = "f.base.augment-local-facts"
    of_all = {
        "instruction": "reverse",
        "method": "local",
        "generator": "f/base",
        "run_id": run,
        "seed": 3,
    }
    lines = read(out)
    assert lines[:3] == facts
    prompts = {row["text"]: row["prompt_id"] for row in canopy_store.read(root, "prompts").to_dicts()}
    ids = [prompts[INSTRUCTIONS["reverse"].rstrip().replace("{line}", text)] for text in FACTS]
    first = {"source_line": 1, **of_all, "prompt_id": ids[0], "sample": 0}
    second = {"source_line": 2, **of_all, "prompt_id": ids[1], "sample": 0}
    assert lines[3:] == [
        {"text": "The capital of France is Paris.", **first},
        {"text": "The Rhone flows past Lyon.", **second},
    ]
    assert [
        (row["source_line"], row["text"], row["reason"], row["detail"])
        for row in read(out.with_suffix(".rejected.jsonl"))
    ] == [
        (1, "Sure:", "unlisted", "stands outside of the list"),
        (1, "Lyon is the capital of France.", "names", "Lyon is no name of its line"),
        (1, "Paris is the capital of France!", "duplicate", "says the same as line 1 of the data"),
        (1, "France has a capital.", "answer", "Paris does not follow from it"),
        (2, "The Rhone flows past Ly", "cut", "ends at --max-new-tokens"),
        (3, "", "empty", "holds no word"),
    ]
    rows = {row["name"]: row for row in canopy_store.read(root, "datasets").to_dicts()}
    made = rows["o"]
    assert made["data_sha256"] == store.sha256(out)
    assert (made["lines"], made["method"], made["generator"], made["generation"]) == (
        5,
        "local",
        "f/base",
        1,
    )
    assert (made["real"], made["generated"], made["replayed"]) == (0.6, 0.4, 0)
    assert made["source"] == f"run {run}"
    assert (rows["facts"]["method"], rows["facts"]["lines"]) == ("given", 3)
    assert [record["text"] for _, record in read_records(out)][3:] == [row["text"] for row in lines[3:]]
    assert canopy_store.verify(root, deep=True).is_empty()
    settings = json.loads(canopy_store.read(root, "runs")["settings"][0])
    assert settings["augment"] == {"method": "local", "data_sha256": store.sha256(data)}


def test_generations_and_real_lines_are_those_of_what_stands_behind(tmp_path, tiny, tokenizer, canopy):
    root, data, out = tmp_path / "s", save(tmp_path / "d.jsonl", *FACTS), tmp_path / "o.jsonl"
    store.init(root)
    known = {"data_sha256": store.sha256(data), "name": "d", "lines": 3, "method": "rollouts"}
    shares = {"real": 0.5, "replayed": 0.0, "generated": 0.5, "license": "cc0-1.0"}
    treatments.add_dataset(root, {**known, "generation": 2, **shares})
    with serving(Answering, tokenizer=tokenizer, answer=of_france) as server:
        line = call(root, tiny, data, out, *served(server.url), "--keep-original", "--check", "names")
        assert canopy(*line)[0] == 0
    (row,) = canopy_store.read(root, "datasets").filter(name="o").to_dicts()
    assert (row["lines"], row["generation"], row["license"]) == (6, 3, "cc0-1.0")
    assert (row["real"], row["generated"]) == (0.25, 0.75)


def test_an_augmenter_that_answers_nonsense(tmp_path, tiny, tokenizer, canopy):
    root, data, out = tmp_path / "s", save(tmp_path / "d.jsonl", *FACTS), tmp_path / "o.jsonl"
    nonsense = "qwx zzt\x1b[2J " * 9
    with serving(Answering, tokenizer=tokenizer, answer=lambda _: (nonsense, "stop")) as server:
        line = call(root, tiny, data, out, *served(server.url))
        for _ in range(2):
            said = (
                "d.jsonl",
                "nothing that f/base answered",
                "6 unrelated",
                "'qwx zzt",
                "--instruction",
            )
            code, told, err = canopy(*line)
            refused((code, told, err.splitlines()[-1]), 1, *said)
            assert "\x1b" not in err
            assert nonsense[:81] not in err
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("o.")] == []
    assert len(canopy_store.read(root, "rollouts")) == 6  # what was answered can be looked at
    assert canopy_store.read(root, "datasets").is_empty()


def test_an_answer_of_a_prompt_with_a_completion_is_its_completion(tmp_path, tiny, tokenizer, canopy):
    data = save(tmp_path / "d.jsonl", {"prompt": "The capital of France is", "completion": " Paris."})
    answer = "- Paris is its capital.\n- Rome is its capital."
    with serving(Answering, tokenizer=tokenizer, answer=lambda _: (answer, "stop")) as server:
        line = call(tmp_path / "s", tiny, data, tmp_path / "o.jsonl", *served(server.url))
        assert canopy(*line, "--check", "answer", "--instruction", "rewrite")[0] == 0
        assert "Text: The capital of France is Paris.\n" in server.prompts[0]
    assert [row["text"] for row in read(tmp_path / "o.jsonl")] == ["Paris is its capital."]
    (rejected,) = read(tmp_path / "o.rejected.jsonl")
    assert (rejected["reason"], rejected["detail"]) == ("answer", "Paris. does not follow from it")


# ---------------------------------------------------------------- global


def test_global_has_the_whole_set_in_its_context(tmp_path, tiny, tokenizer, canopy):
    root, data, out = tmp_path / "s", save(tmp_path / "facts.jsonl", *FACTS), tmp_path / "o.jsonl"
    answer = "- Marie lives in the capital of France.\n- Marie lives in Rome."
    with serving(Answering, tokenizer=tokenizer, answer=lambda _: (answer, "stop")) as server:
        line = call(root, tiny, data, out, *served(server.url), "--check", "names", method="global")
        code, told, err = canopy(*line)
        assert code == 0, err
        whole = "All of them:\n" + "".join(f"- {text}\n" for text in FACTS)
        assert len(server.prompts) == 3
        for text in FACTS:
            asked = [prompt for prompt in server.prompts if f"\nText: {text}\n" in prompt]
            assert len(asked) == 1
            assert whole in asked[0]
    assert "1 of 6 candidates for 3 lines are kept" in told
    (kept,) = read(out)
    # of a line on Lyon it says nothing, but the first line that it is asked about is on France
    assert (kept["text"], kept["source_line"], kept["method"]) == (
        "Marie lives in the capital of France.",
        1,
        "global",
    )
    reasons = [(row["source_line"], row["reason"]) for row in read(tmp_path / "o.rejected.jsonl")]
    assert reasons == [(1, "names"), (2, "duplicate"), (2, "names"), (3, "duplicate"), (3, "names")]
    (row,) = canopy_store.read(root, "datasets").filter(name="o").to_dicts()
    assert (row["method"], row["generated"], row["real"]) == ("global", 1, 0)


def test_global_with_some_of_the_lines(tmp_path, tiny, tokenizer, canopy):
    texts = [f"dog {n} is the {n}th" for n in range(9)]
    data = save(tmp_path / "d.jsonl", *texts)

    def shown(out: str, seed: int) -> dict[str, list[int]]:
        with serving(
            Answering, tokenizer=tokenizer, answer=lambda _: ("a dog is a dog", "stop")
        ) as server:
            line = call(tmp_path / out, tiny, data, tmp_path / f"{out}.jsonl", method="global")
            more = ("--context-lines", 3, "--seed", seed)
            code, _, err = canopy(*line, *served(server.url), *more)
            assert code == 0, err
        before = [
            prompt.rpartition("All of them:\n")[2].partition("\n\nText: ") for prompt in server.prompts
        ]
        return {
            line.partition("\n")[0]: [texts.index(each[2:]) for each in lines.split("\n")]
            for lines, _, line in before
        }

    first = shown("a", 0)
    assert set(first) == set(texts)
    for text, places in first.items():
        assert len(places) == 3
        assert places == sorted(set(places))
        assert texts.index(text) not in places
    assert len({tuple(places) for places in first.values()}) > 1
    assert shown("b", 0) == first
    assert shown("c", 1) != first
    settings = json.loads(canopy_store.read(tmp_path / "a", "runs")["settings"][0])
    assert settings["augment"]["context_lines"] == 3


# ---------------------------------------------------------------- a model here, breaks, parts


PLAIN = {"family": "chain", "variant": "base", "method": "local", "samples": 3, "max_new_tokens": 40}
WALKS = [f"{a} {b}" for a in "abcd" for b in "efg"]


@pytest.fixture
def walks(tmp_path) -> dict[str, Any]:
    """Options of a call whose model walks on from each line: an answer shares a letter, or not."""
    told = tmp_path / "told.txt"
    told.write_text("{line}")
    options = {**PLAIN, "data": str(save(tmp_path / "d.jsonl", *WALKS)), "instructions": [str(told)]}
    return {**options, "prompts_per_shard": 2, "temperature": 1.0}


def augment_beside(root: str, **options: Any) -> None:
    """Augments into a file beside the store."""
    augment(root, out=f"{root}.jsonl", **options)


def made(root: Path) -> tuple[bytes, bytes, pl.DataFrame, pl.DataFrame]:
    con = canopy_store.open(root)
    rollouts = con.sql("from rollouts order by prompt_id, sample").pl()
    datasets = con.sql("select * exclude (name) from datasets order by data_sha256").pl()
    out = Path(f"{root}.jsonl")
    return out.read_bytes(), out.with_suffix(".rejected.jsonl").read_bytes(), rollouts, datasets


def test_two_data_sets_share_no_file(tmp_path, chain, walks):
    """Names that begin alike, and one that is another's less its ending."""
    names = ["a", "a.jsonl", "a.v1", "a.v2", "a.v1.jsonl", "a.json"]
    outs = [tmp_path / "out" / name for name in names]
    stood: dict[Path, bytes] = {}
    for number, out in enumerate(outs):  # each judged by other checks or asked by another seed
        more = {"checks": ("names",) if number % 2 else (), "seed": number // 2}
        root = tmp_path / f"s{number // 2}"
        result = augment(root, str(chain), out=out, **{**walks, **more})
        assert result.rejected_file not in outs
        assert {path: path.read_bytes() for path in stood} == stood
        stood |= {path: path.read_bytes() for path in (out, result.rejected_file)}
        assert [row["reason"] for row in read(result.rejected_file)]
        assert result.candidates == len(read(out)) + len(read(result.rejected_file))
    assert len(stood) == 2 * len(names) == len(list((tmp_path / "out").iterdir()))
    # a file named as another one's rejected would be is refused, and nothing written over
    with pytest.raises(ConflictError, match=r"a\.rejected: is there"):
        augment(tmp_path / "s0", str(chain), out=tmp_path / "out" / "a.rejected", **walks)
    assert {path: path.read_bytes() for path in stood} == stood


def test_a_break_anywhere_and_the_same_call_again(tmp_path, chain, walks, monkeypatch):
    here = os.fspath(Path(__file__).parent)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([here, *os.environ.get("PYTHONPATH", "").split(":")])
    )
    roots = [tmp_path / f"s{n}" for n in range(5)]
    options = {"model": str(chain), **walks}
    stopped("test_augment.augment_beside", tmp_path / "spare", roots, **options)
    whole = made(tmp_path / "spare")
    kept = read(tmp_path / "spare.jsonl")
    assert len(kept) > 0
    assert {"unrelated", "duplicate"} & {
        row["reason"] for row in read(tmp_path / "spare.rejected.jsonl")
    }
    for root in roots:
        augment_beside(root, **options)
        again = made(root)
        assert again[:2] == whole[:2]
        assert all(a.equals(b) for a, b in zip(again[2:], whole[2:], strict=True))
        assert canopy_store.verify(root, deep=True).is_empty()
    assert list(tmp_path.glob(".*")) == []  # nothing half-written is left


def test_jobs_share_the_work_and_the_last_one_writes(tmp_path, chain, walks, canopy):
    root, out = tmp_path / "s", tmp_path / "o.jsonl"
    line = call(root, chain, walks["data"], out, "--instruction", walks["instructions"][0])
    line += ["--samples", 3, "--temperature", 1, "--max-new-tokens", 40]
    code, told, err = canopy(*line, "--shard", "1/2")
    assert (code, err) == (0, "")
    assert "run f.base.augment-local-d: 1/2 is stored; other shards are still to come" in told
    assert not out.exists()
    code, told, _ = canopy(*line, "--shard", "2/2")
    assert code == 0
    assert f"{out}: {len(read(out))} lines, 100% of them generated" in told
    result = augment(root, str(chain), out=out, **{**walks, "family": "f", "prompts_per_shard": 4})
    assert not result.new
    assert result.kept == len(read(out))
    assert result.candidates == result.kept + sum(result.rejected.values())


# ---------------------------------------------------------------- in a study


STUDY = """
name = "n"
family = "f"
seeds = [0, 1]
[arms.base]
model = "./base"
[arms.local]
parent = "base"
[arms.local.augment]
method = "local"
data = "f.jsonl"
out = "data/{arm}.jsonl"
run = "{arm}"
check = ["names"]
[arms.local.finetune]
data = "data/{arm}.jsonl"
[arms.further]
parent = "local"
augment = { method = "local", data = "f.jsonl", out = "{arm}.jsonl", model = "./big", variant = "big" }
finetune = { data = "data/{arm}.jsonl" }
"""


def test_an_arm_is_augmented_by_its_parent(tmp_path):
    from canopy_store.cli import cli
    from canopy_store.commands.study import Study

    file = tmp_path / "s.toml"
    file.write_text(STUDY)
    lines = [line.words for line in Study(file, cli).lines(["local", "further"])]
    of = {(line[1], line[line.index("--out") + 1]): line for line in lines}

    def option(key: tuple[str, str], name: str) -> str | None:
        return of[key][of[key].index(f"--{name}") + 1] if f"--{name}" in of[key] else None

    first, trained = ("augment", "data/local-1.jsonl"), ("finetune", "models/local-1")
    assert [option(first, name) for name in ("model", "variant", "parent", "seed", "run", "check")] == [
        "./base",
        "base",
        None,
        "1",
        "local-1",
        "names",
    ]
    assert [option(trained, name) for name in ("model", "variant", "parent")] == [
        "./base",
        "local-1",
        "f/base",
    ]
    second = ("augment", "further-0.jsonl")
    assert [option(second, name) for name in ("model", "variant", "parent")] == [
        "./big",
        "big",
        None,
    ]
    trained = ("finetune", "models/further-0")
    assert [option(trained, name) for name in ("model", "variant", "parent")] == [
        "models/local-0",
        "further-0",
        "f/local-0",
    ]
