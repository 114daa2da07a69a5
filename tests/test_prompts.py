"""Prompts as JSONL, CSV and Parquet are the same prompts; what stands before them is the run's."""

from __future__ import annotations

import csv
import json
import os
from threading import Thread

import polars as pl
import pytest
from stores import ingest_arguments, refused, write_prompts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import canopy_store
from canopy_store import DataError, StoreError, UsageError, store
from canopy_store.analysis.regression.panel import panel_file
from canopy_store.ingest.prompts import read_prompts
from canopy_store.ingest.rendering import Context, read_context, read_system, render
from canopy_store.ingest.training_data import check_records

TURNS = [{"role": "user", "content": "a, or b?"}, {"role": "assistant", "content": 'say "c"'}]
LINES = [
    {"text": "two\nlines, and a comma", "reference": "007", "source": "here"},
    {"text": 'he said "so"', "prompt_id": "17"},
    {"messages": TURNS, "license": "cc0-1.0"},
]


def test_jsonl_csv_and_parquet_are_the_same_prompts(tmp_path):
    names = ["text", "messages", "prompt_id", "reference", "source", "license"]
    rows = [{**dict.fromkeys(names), **line} for line in LINES]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    pl.DataFrame(rows, schema_overrides={"reference": pl.String}).write_parquet(tmp_path / "p.parquet")
    flat = [{**row, "messages": json.dumps(row["messages"]) if row["messages"] else ""} for row in rows]
    pl.DataFrame(flat).write_csv(tmp_path / "p.csv")
    pl.DataFrame(flat).rename({"text": "prompt", "prompt_id": "id"}).write_csv(
        tmp_path / "p.tsv", separator="\t", include_bom=True
    )
    first, *others = (
        [{k: v for k, v in prompt.items() if k != "line"} for prompt in read_prompts(path)]
        for path in (tmp_path / f"p.{kind}" for kind in ("jsonl", "csv", "parquet", "tsv"))
    )
    assert [prompt["text"] for prompt in first] == [LINES[0]["text"], LINES[1]["text"], None]
    assert first[0]["reference"] == "007"
    for other in others:
        assert other == first
    # a quoted line break takes a line of the file: rows are named by where they begin
    assert [prompt["line"] for prompt in read_prompts(tmp_path / "p.csv")] == [2, 4, 5]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "question,answer\na,b\n", "line 1: needs a column text (or prompt, or messages)"),
        ("p.csv", "text,id\na,1\nb\n", "line 3: 1 cells, and the header has 2"),
        ("p.csv", "text\na\n\nb\n", "line 3: empty line; remove it"),
        ("p.csv", "text\na\na\n", "line 3: the same prompt as line 2"),
        ("p.csv", 'text,source\n"a\nb",x\n,y\n', "line 4: needs text (or prompt, or messages)"),
        ("p.csv", "text,text\na,b\n", "column text twice"),
        ("p.csv", "messages\nhello\n", "line 2: messages is not JSON"),
        ("p.csv", "text\n", "holds no prompts"),
        ("p.csv", "", "holds no prompts"),
        ("p.csv", b"text\ncaf\xe9\n", "line 2: not UTF-8; save the file as UTF-8"),
        ("p.csv", 'text\n"a\nb\nc\n', "line 2: not CSV (unexpected end of data)"),
        ("p.csv", 'text\n"so" he said\n', "line 2: not CSV"),
        ("p.csv", 'text\na\n\n"b\n', "line 4: not CSV"),
        ("p.tsv", 'text\n"So," he said\nb\n', "line 2: not CSV"),
        ("p.jsonl", "text\na\n", "line 1: not JSON"),
        ("p.jsonl", "text\na\n", "name a CSV file .csv"),
        ("p.parquet", "no parquet", "not a readable Parquet file"),
    ],
)
def test_a_table_that_is_refused(tmp_path, canopy, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(canopy(*ingest_arguments(tmp_path / "s", tmp_path, path)), 1, str(path), message)
    assert not (tmp_path / "s").exists()


def test_a_cell_of_a_csv_file_is_as_long_as_it_likes(tmp_path):
    text = "word " * 40_000
    (tmp_path / "p.csv").write_text(f"text,id\n{text},1\n")
    limit = csv.field_size_limit()
    assert [prompt["text"] for prompt in read_prompts(tmp_path / "p.csv")] == [text]
    assert csv.field_size_limit() == limit


def test_brackets_in_a_file_name_are_no_pattern(tmp_path):
    for name, text in (("p[1].parquet", "this"), ("p1.parquet", "another")):
        with (tmp_path / name).open("wb") as file:
            pl.DataFrame({"text": [text]}).write_parquet(file)
    assert read_prompts(tmp_path / "p[1].parquet")[0]["text"] == "this"
    assert panel_file(tmp_path / "p[1].parquet")["text"].to_list() == ["this"]
    for name, text in (("p[1].csv", "this"), ("p1.csv", "another")):
        (tmp_path / name).write_text(f"text\n{text}\n")
    assert panel_file(tmp_path / "p[1].csv")["text"].to_list() == ["this"]


READERS = [read_prompts, lambda path: read_context(None, path), panel_file, check_records]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("read", [*READERS, lambda path: read_system(f"@{path}")])
def test_a_device_is_refused_before_it_is_read(tmp_path, read, kind):
    path = tmp_path / f"p.{kind}"
    path.symlink_to("/dev/zero")
    with pytest.raises(DataError, match=f"{path}: (a device, not a file|not a file)"):
        read(path)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("read", READERS)
def test_a_pipe_that_nobody_writes_to_is_not_waited_for(tmp_path, read, kind):
    path = tmp_path / f"p.{kind}"
    os.mkfifo(path)
    with pytest.raises(DataError, match=str(path)):
        read(path)


def test_prompts_come_through_a_pipe():
    # more than a pipe holds, so its writer waits for the reader
    lines = [json.dumps({"text": "word " * 50, "prompt_id": str(i)}) for i in range(500)]
    out, into = os.pipe()

    def write() -> None:
        with os.fdopen(into, "w") as file:
            file.write("\n".join(lines))

    Thread(target=write, daemon=True).start()
    try:
        prompts = read_prompts(f"/dev/fd/{out}")
    finally:
        os.close(out)
    assert [prompt["prompt_id"] for prompt in prompts] == [str(i) for i in range(500)]


def test_rollouts_of_a_csv_file(tmp_path, chain, canopy):
    (tmp_path / "p.csv").write_text("id,text,reference\nfirst,a b,c\nsecond,b c,\n")
    assert canopy(*ingest_arguments(tmp_path / "s", chain, tmp_path / "p.csv", samples=3))[0] == 0
    rows = canopy_store.read(tmp_path / "s", "prompts").sort("prompt_id")
    assert rows.select("prompt_id", "text", "reference").rows() == [
        ("first", "a b", "c"),
        ("second", "b c", None),
    ]


def test_a_reference_that_a_table_of_numbers_lacks_is_none(tmp_path):
    pl.DataFrame({"text": ["a", "b"], "reference": [1.5, float("nan")]}).write_parquet(
        tmp_path / "p.parquet"
    )
    assert [row["reference"] for row in read_prompts(tmp_path / "p.parquet")] == ["1.5", None]


# ---------------------------------------------------------------- before each prompt


@pytest.fixture(scope="module")
def chatty() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, which decodes to what it was given, with a chat template."""
    letters = {letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


PROMPT = {"text": "3 + 3?", "messages": None}
PAIR = {"prompt": "1 + 1?", "completion": " 2"}


@pytest.mark.parametrize(
    ("rendering", "context", "text"),
    [
        ("chat", Context(), "<user>3 + 3?\n<assistant>"),
        ("chat", Context("Be brief."), "<system>Be brief.\n<user>3 + 3?\n<assistant>"),
        (
            "chat",
            Context("Be brief.", (PAIR, {"messages": TURNS})),
            "<system>Be brief.\n<user>1 + 1?\n<assistant> 2\n"
            '<user>a, or b?\n<assistant>say "c"\n<user>3 + 3?\n<assistant>',
        ),
        ("plain", Context(), "3 + 3?"),
        ("plain", Context("Be brief.", (PAIR, PAIR)), "Be brief.\n\n1 + 1? 2\n\n1 + 1? 2\n\n3 + 3?"),
    ],
)
def test_what_stands_before_a_prompt(chatty, rendering, context, text):
    assert chatty.decode(render(PROMPT, chatty, rendering, "here", context)) == text


def test_contexts_that_a_prompt_cannot_have(chatty):
    two = {"text": None, "messages": json.dumps([{"role": "system", "content": "x"}, *TURNS[:1]])}
    with pytest.raises(DataError, match="begin with a system message"):
        render(two, chatty, "chat", "here", Context("Be brief."))
    with pytest.raises(DataError, match="messages need --template chat"):
        render(PROMPT, chatty, "plain", "here", Context(None, ({"messages": TURNS},)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"}', "line 1: an example needs"),
        (
            '{"messages": [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "--system",
        ),
        (json.dumps({"messages": [TURNS[1], TURNS[0]]}), "ends with the assistant's message"),
        ("", "line 1: empty line"),
    ],
)
def test_examples_that_are_refused(tmp_path, line, message):
    (tmp_path / "e.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        read_context(None, tmp_path / "e.jsonl")


def test_a_system_message_in_a_file(tmp_path):
    (tmp_path / "system.txt").write_text("Be brief.\nAlways.\n")
    assert read_system(f"@{tmp_path / 'system.txt'}") == "Be brief.\nAlways."
    assert read_system("Be brief.") == "Be brief."
    with pytest.raises(StoreError, match="--system @none: cannot be read"):
        read_system("@none")
    with pytest.raises(UsageError, match="--system: needs a text"):
        read_context(" ", None)


def test_the_context_is_the_runs_and_the_prompt_stays_the_same(tmp_path, chain, canopy):
    prompts = write_prompts(tmp_path / "p.jsonl", "a b", "c")
    (tmp_path / "e.jsonl").write_text(json.dumps({"prompt": "d", "completion": " e"}) + "\n")
    root = tmp_path / "s"
    bare = ingest_arguments(root, chain, prompts, samples=4, run="bare")
    shown = ingest_arguments(root, chain, prompts, samples=4, run="shown")
    shown += ["--system", "f g", "--examples", str(tmp_path / "e.jsonl")]
    assert canopy(*bare)[0] == canopy(*shown)[0] == 0
    rollouts = canopy_store.read(root, "rollouts")
    ids = {run: set(rollouts.filter(run_id=run)["prompt_id"]) for run in ("bare", "shown")}
    assert ids["bare"] == ids["shown"]
    [settings] = canopy_store.read(root, "runs").filter(run_id="shown")["settings"]
    settings = json.loads(settings)
    assert settings["system"] == "f g"
    assert settings["examples"] == [{"prompt": "d", "completion": " e"}]
    assert settings["examples_sha256"] == store.content_id(settings["examples"])
    [plain] = canopy_store.read(root, "runs").filter(run_id="bare")["settings"]
    assert {"system", "examples", "examples_sha256"}.isdisjoint(json.loads(plain))
    # resumed with another one it is refused
    refused(canopy(*shown[:-4], "--system", "f"), 1, "run shown is stored with other settings", "system")
    assert canopy(*shown)[0] == 0
    # and its own model scores it after the very tokens it was sampled from
    code, _, err = canopy("ingest", "score", "--store", root, "--scorer", chain, "--run", "shown")
    assert code == 0, err
    assert "scored by its own model" in err
