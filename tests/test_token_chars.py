"""Where in its text each token stands: from tokenizers, servers' logs, in files and through upkeep."""

from __future__ import annotations

import json
from itertools import accumulate, pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import enter, rewrite, rollouts, shell, write_parquet
from tiny import TEXTS, save_tiny

import canopy_store
from canopy_store import sql, store
from canopy_store.errors import DataError
from canopy_store.readers.token_chars import chars_of_bytes, token_chars
from canopy_store.upkeep.verify import verify


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tokenizer of a tiny model, byte-level, and the model's folder."""
    from canopy_store.ingest.tokenizer import load_tokenizer

    folder = save_tiny(tmp_path_factory.mktemp("tiny"), 0)
    return load_tokenizer(str(folder)), folder


def pieces():
    """A tokenizer in the way of SentencePiece: spaces as ▁, unknown characters as bytes."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = [
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        "▁the",
        "▁a",
        "n",
        "e",
        "▁▁",
        "東",
    ]
    vocabulary = {word: number for number, word in enumerate(words)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<s>"))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def settled(tokenizer, ids, tails) -> list[int]:
    """Characters that stand after each token, by decoding: those that no tail can change."""
    read = []
    for step in range(1, len(ids) + 1):
        now = tokenizer.decode(ids[:step], skip_special_tokens=True)
        after = [tokenizer.decode([*ids[:step], *tail], skip_special_tokens=True) for tail in tails]
        read.append(len(now) - (not all(text.startswith(now) for text in after)))
    return read


# ---- from a tokenizer


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 319), min_size=1, max_size=12))
def test_byte_level_tokens_stand_where_decoding_settles_them(tiny, ids):
    tokenizer, _ = tiny
    text = tokenizer.decode(ids, skip_special_tokens=True)
    chars = token_chars(tokenizer, ids, text)
    # bytes that go on with a character which is not whole
    vocabulary = tokenizer.get_vocab()
    byte = {b: vocabulary[c] for b, c in ((0x80, "Ģ"), (0x90, "Ĳ"), (0xA0, "ł"), (0xBF, "¿"))}
    ends = settled(tokenizer, ids, [[b, *[byte[0x80]] * n] for b in byte.values() for n in range(3)])
    ends[-1] = len(text)
    # the last token with bytes has what was cut; special ones after it show nothing
    last = max((i for i, n in enumerate(ids) if n > 1), default=0)
    ends[last:] = [len(text)] * (len(ids) - last)
    assert list(accumulate(chars)) == ends


def test_a_character_is_the_last_of_the_tokens_that_spell_it(tiny):
    tokenizer, _ = tiny
    for text in TEXTS.values():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        chars = token_chars(tokenizer, ids, text)
        assert sum(chars) == len(text)
        assert chars[-1] == 0
        for number, end in zip(ids, accumulate(chars), strict=True):
            whole = tokenizer.decode([number], skip_special_tokens=True)
            if "\ufffd" not in whole:
                assert text[:end].endswith(whole)
    # a character that is new to the vocabulary is as many tokens as bytes
    ids = tokenizer("a𝔘b", add_special_tokens=False)["input_ids"]
    assert token_chars(tokenizer, ids, "a𝔘b") == [1, 0, 0, 0, 1, 1]


def test_pieces_of_sentences_stand_where_decoding_settles_them():
    tokenizer = pieces()
    names = ["▁the", "n", "<0xE6>", "<0x9D>", "<0xB1>", "▁▁", "</s>", "東", "e", "</s>"]
    ids = tokenizer.convert_tokens_to_ids(names)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert text == "then東  東e"  # the first space is not of the text
    assert token_chars(tokenizer, ids, text) == [3, 1, 0, 0, 1, 2, 0, 1, 1, 0]
    assert token_chars(tokenizer, tokenizer.convert_tokens_to_ids(["▁", "▁a"]), " a") == [0, 2]


def test_nothing_is_guessed(tiny):
    tokenizer, _ = tiny
    ids = tokenizer("a dog", add_special_tokens=False)["input_ids"]
    assert token_chars(tokenizer, ids, "a dog ") is None
    assert token_chars(tokenizer, [*ids, 5000], "a dog") is None
    assert token_chars(tokenizer, [1, 1], "") == [0, 0]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30), st.data())
def test_bytes_cut_anywhere_give_back_the_text(text, data):
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    parts = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    ends = list(accumulate(chars_of_bytes(parts, text)))
    for end, stop in zip(ends, [*cuts, len(raw)], strict=True):
        # as many characters as fit whole into the bytes read
        assert len(text[:end].encode()) <= stop
        assert end == len(text) or len(text[: end + 1].encode()) > stop
    assert chars_of_bytes(parts, text + "x") is None


# ---- in the store


def rows(**more) -> list[dict]:
    own = {"family": "f", "variant": "base", "task": "t", "entropy": [0.5, 0.25, 0.0]}
    return [
        {**own, "prompt_id": "p", "sample": 0, "text": "東京 x", "token_chars": [1, 1, 2], **more},
        {**own, "prompt_id": "p", "sample": 1, "text": None, "token_chars": None},
    ]


def test_sampled_rollouts_have_their_tokens_in_their_text(tiny, tmp_path):
    from canopy_store.ingest.rollouts import ingest_rollouts

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"text": "The quick"}) + "\n")
    root = tmp_path / "store"
    names = {"family": "f", "variant": "v", "task": "t"}
    ingest_rollouts(root, str(tiny[1]), prompts=prompts, samples=6, max_new_tokens=12, **names)
    shown = sql.read(root, "rollouts")
    assert shown["token_chars"].null_count() == 0
    for ids, chars, text in shown.select("token_ids", "token_chars", "text").iter_rows():
        assert len(chars) == len(ids)
        assert sum(chars) == len(text)
        assert [c for i, c in zip(ids, chars, strict=True) if i < 2] == [0] * sum(i < 2 for i in ids)
    assert verify(root, deep=True).is_empty()


@pytest.mark.parametrize("chars", [[1, 1], [1, 1, 1], [5, -1, 0], [1, None, 3]])
def test_characters_that_are_not_the_texts_are_refused(tmp_path, chars):
    with pytest.raises(DataError, match=r"row 0: token_chars"):
        canopy_store.import_rollouts(
            tmp_path / "s", write_parquet(tmp_path / "r.parquet", rows(token_chars=chars))
        )
    assert not list((tmp_path / "s").glob("rollouts/**/*.parquet"))


def old(root: Path) -> Path:
    """The store as one that was made before the column: its files lack it."""
    for path in store.files(root, "rollouts"):
        store.write_table(path, "rollouts", store.read_rows(path).drop_columns(["token_chars"]))
        enter(root, path)
    return root


def test_files_from_before_the_column_stand_beside_those_with_it(tmp_path):
    def made(name: str, variant: str) -> Path:
        root = tmp_path / name
        canopy_store.import_rollouts(
            root, write_parquet(tmp_path / "r.parquet", rows(variant=variant)[:1])
        )
        return root

    root, other = old(made("a", "base")), made("b", "tuned")
    (path,) = store.files(root, "rollouts")
    assert "token_chars" not in pq.read_schema(path).names
    assert sql.read(root, "rollouts")["token_chars"].to_list() == [None]
    assert verify(root, deep=True).is_empty()
    assert sql.read(root, "rollout_metrics").height == 1
    sql.write_database(root)
    assert shell(root, "select count(token_chars) as n from rollouts") == [{"n": 0}]
    canopy_store.merge([other], root)
    shown = sql.read(root, "rollouts").sort("variant")["token_chars"].to_list()
    assert shown == [None, [1, 1, 2]]
    assert verify(root, deep=True).is_empty()
    canopy_store.export(root, tmp_path / "out")
    canopy_store.export(root, tmp_path / "bare", text=False)
    assert sql.read(tmp_path / "out", "rollouts").sort("variant")["token_chars"].to_list() == shown
    assert sql.read(tmp_path / "bare", "rollouts")["token_chars"].null_count() == 2


def test_old_and_new_shards_of_a_run_are_compacted_into_one(tmp_path, monkeypatch):
    monkeypatch.setattr("canopy_store.readers.importing._ROLLOUTS_PER_SHARD", 2)
    more = [{**row, "prompt_id": f"q{n}"} for n in range(6) for row in rows()[:1]]
    root = tmp_path / "store"
    canopy_store.import_rollouts(root, write_parquet(tmp_path / "r.parquet", more))
    first, *rest = store.files(root, "rollouts")
    assert rest
    store.write_table(first, "rollouts", store.read_rows(first).drop_columns(["token_chars"]))
    enter(root, first)
    before = rollouts(root)
    assert 0 < before["token_chars"].null_count() < len(before)
    canopy_store.compact(root)
    assert len(store.files(root, "rollouts")) == 1
    assert rollouts(root).equals(before)
    assert verify(root, deep=True).is_empty()


def test_verify_finds_tokens_that_are_not_in_their_text(tmp_path):
    root = tmp_path / "store"
    canopy_store.import_rollouts(root, write_parquet(tmp_path / "r.parquet", rows()))
    (path,) = store.files(root, "rollouts")
    for wrong in ([1, 1, 3], [1, 3], [5, -1, 0]):
        rewrite(path, "rollouts", lambda c, wrong=wrong: c["token_chars"].__setitem__(0, wrong))
        enter(root, path)
        said = verify(root, deep=True)["what"].to_list()
        assert any("token_chars" in line and "sample 0" in line for line in said), said


# ---- from logs


def test_logged_bytes_of_a_batch_place_its_tokens(tmp_path):
    tokens = [
        ("\\xe6", [0xE6]),
        ("\\x9d\\xb1", [0x9D, 0xB1]),
        (" x", [32, 120]),
        ("</s>", list(b"</s>")),
    ]
    content = [{"token": t, "logprob": -0.5, "bytes": b, "top_logprobs": []} for t, b in tokens]

    def line(name: str, text: str) -> str:
        choice = {
            "message": {"content": text},
            "finish_reason": "stop",
            "logprobs": {"content": content},
        }
        body = {"choices": [choice], "model": "m"}
        return json.dumps({"custom_id": name, "response": {"status_code": 200, "body": body}}) + "\n"

    source = tmp_path / "batch.jsonl"
    source.write_text(line("a", "東 x") + line("b", "東 y"))
    root = tmp_path / "store"
    names = {"family": "f", "variant": "v", "task": "t", "temperature": 1.0}
    canopy_store.import_rollouts(root, source, **names)
    assert rollouts(root)["token_chars"].to_list() == [[0, 1, 2, 0], None]


def test_an_import_with_a_tokenizer_places_its_tokens(tiny, tmp_path):
    source = tmp_path / "lines.jsonl"
    record = {
        "doc_id": 0,
        "doc": {},
        "arguments": {"a": {"arg_0": "p", "arg_1": {}}},
        "resps": [["It is 7 — 𝔘"]],
    }
    source.write_text(
        json.dumps({**record, "filter": "none", "target": "", "filtered_resps": ["x"]}) + "\n"
    )
    root = tmp_path / "store"
    names = {"family": "f", "variant": "v", "task": "t", "format": "lm-eval"}
    canopy_store.import_rollouts(root, source, tokenizer=tiny[0], **names)
    (row,) = rollouts(root).to_dicts()
    at = [0, *accumulate(row["token_chars"])]
    spelled = [row["text"][a:b] for a, b in pairwise(at)]
    assert "".join(spelled) == "It is 7 — 𝔘"
    assert " 7" in spelled
    assert spelled[-4:] == ["", "", "", "𝔘"]  # a token a byte
