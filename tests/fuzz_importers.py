"""Damaged inputs for every importer and the prompt reader: only this package's errors may come out.

    python tests/fuzz_importers.py --minutes 10

draws damage with hypothesis until the time is over, prints what it tried, and keeps each input that
raised anything else under tests/data/seeds, where test_fuzz.py replays it.
"""

from __future__ import annotations

import argparse
import base64
import copy
import hashlib
import io
import json
import os
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from canopy_store import import_rollouts, sql
from canopy_store.errors import CanopyError
from canopy_store.ingest.prompts import read_prompts
from canopy_store.readers.inspect_log import _member

DATA = Path(__file__).parent / "data"
SEEDS = DATA / "seeds"
Files = dict[str, bytes]  # an input: its files by relative path; the first is what is imported

_words = Tokenizer(models.WordLevel({w: i for i, w in enumerate("abcdefgh")}, unk_token="a"))
_words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=_words, unk_token="a")


_DEEP = {f"@deep{n}@": b"[" * n + b"]" * n for n in (60, 900, 100_000)}  # what dumped() puts there
NASTY = [
    None,
    True,
    0,
    1,
    -1,
    2**31,
    2**63,
    2**70,
    10**400,
    -(10**30),
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    -9999.0,
    "",
    "a",
    "\ud800",
    "\x00",
    "é" * 300,
    "token_id:5",
    "token_id:99999999999",
    "attachment://x",
    "../../x",
    [],
    {},
    [[]],
    [None],
    [1],
    ["a"],
    {"": None},
    {"a": [1]},
    *_DEEP,
]


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    return [path, *(p for key, child in items for p in _paths(child, (*path, key)))]


def damage_json(draw: Callable[..., Any], value: Any) -> Any:
    """The value with one to three of its nodes replaced, removed, doubled or swapped."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        *above, last = draw(st.sampled_from(_paths(value)[1:] or [("x",)]))
        parent = value
        for key in above:
            parent = parent[key]
        how = draw(st.sampled_from(["replace", "replace", "remove", "double", "swap"]))
        if how == "remove" and last in (parent if isinstance(parent, dict) else range(len(parent))):
            del parent[last]
        elif how == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[last]))
        elif how == "swap" and isinstance(parent, dict | list):
            keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
            other = draw(st.sampled_from(keys or [last]))
            parent[last], parent[other] = parent[other], parent[last]
        elif isinstance(parent, dict | list) and (isinstance(parent, dict) or last < len(parent)):
            parent[last] = copy.deepcopy(draw(st.sampled_from(NASTY)))
        if not _paths(value)[1:]:
            break
    return value


def damage_bytes(draw: Callable[..., Any], raw: bytes) -> bytes:
    """The bytes with one to four places flipped, cut, filled or repeated."""
    data = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        end = at + draw(st.sampled_from([1, 1, 2, 4, 8, 64, 1000]))
        how = draw(st.sampled_from(["flip", "set", "cut", "insert", "end", "repeat"]))
        if how == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "set":
            data[at:end] = draw(st.sampled_from([b"\x00", b"\xff"])) * len(data[at:end])
        elif how == "cut":
            del data[at:end]
        elif how == "insert":
            data[at:at] = draw(
                st.sampled_from([b"\x00", b"\xff" * 8, b'"', b"{", b"}", b"\n", b"\r\n", b"1e9"])
            )
        elif how == "end":
            del data[at:]
        else:
            data[at:at] = data[at:end]
    return bytes(data)


def dumped(value: Any) -> bytes:
    data = json.dumps(value).encode()
    for name, nested in _DEEP.items():
        data = data.replace(b'"' + name.encode() + b'"', nested)
    return data


# ---------------------------------------------------------------- the inputs


def _jsonl(name: str, source: bytes) -> Callable[[Callable[..., Any]], Files]:
    def build(draw: Callable[..., Any]) -> Files:
        if draw(st.booleans()):
            return {name: damage_bytes(draw, source)}
        lines = [json.loads(line) for line in source.splitlines()]
        at = draw(st.integers(0, len(lines) - 1))
        lines[at] = damage_json(draw, lines[at])
        return {name: b"".join(dumped(line) + b"\n" for line in lines)}

    return build


_LOG = (DATA / "readers" / "walks.eval").read_bytes()
with zipfile.ZipFile(io.BytesIO(_LOG)) as _zip:
    _MEMBERS = {name: _member(_zip, Path("log"), name) for name in _zip.namelist()}


def _inspect(draw: Callable[..., Any]) -> Files:
    if draw(st.booleans()):
        return {"log.eval": damage_bytes(draw, _LOG)}
    read = [n for n in _MEMBERS if n == "header.json" or n.startswith("samples/")]
    members = {name: dumped(_MEMBERS[name]) for name in read}
    name = draw(st.sampled_from(read))
    if draw(st.integers(0, 4)):
        members[name] = dumped(damage_json(draw, _MEMBERS[name]))
    else:
        members[name] = damage_bytes(draw, members[name])
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as log:
        for name, data in members.items():
            log.writestr(name, data)
    return {"log.eval": stream.getvalue()}


_RUN = "f/t/v/r/"
_TENSORS = {
    "prompt_token_ids": np.arange(2),
    "sequence_lengths": np.array([2, 1]),
    "generated_token_ids_flat": np.arange(3),
    "step_conditional_entropy_flat": np.ones(3, np.float32),
    "sequence_step_logprobs.00000": -np.ones(2, np.float32),
    "sequence_step_logprobs.00001": -np.ones(1, np.float32),
}
_PAPER: Files = {
    _RUN + "metadata.json": json.dumps(
        {
            "prompt_file": "t.jsonl",
            "num_prompts_processed": 1,
            "model_name": "f",
            "model_variant": "v",
            "max_new_tokens": 4,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "logprobs": 9,
        }
    ).encode(),
    _RUN + "rollout_shards/000000.safetensors": save(
        _TENSORS,
        {
            "prompt": "p",
            "generated_texts": '["a", "b"]',
            "samples": "[0, 1]",
            "finish_reasons": '["stop", null]',
        },
    ),
    _RUN + "embedding_shards/e/000000.safetensors": save({"embeddings": np.eye(2, 3, dtype=np.float32)}),
}


def _paper(draw: Callable[..., Any]) -> Files:
    files = dict(_PAPER)
    name = draw(st.sampled_from(list(files)))
    raw = files[name]
    if name.endswith(".json"):
        files[name] = dumped(damage_json(draw, json.loads(raw)))
    elif draw(st.booleans()):
        files[name] = damage_bytes(draw, raw)
    else:
        size = int.from_bytes(raw[:8], "little")
        header = dumped(damage_json(draw, json.loads(raw[8 : 8 + size])))
        files[name] = len(header).to_bytes(8, "little") + header + raw[8 + size :]
    return files


_COLUMNS: dict[str, list[Any]] = {
    "family": ["f"] * 3,
    "variant": ["v"] * 3,
    "task": ["t"] * 3,
    "prompt_id": ["p", "p", "q"],
    "sample": [0, 1, 0],
    "text": ["a", "b", None],
    "entropy": [[0.5, 0.25], [1.0], [0.5]],
    "logprob": [[-0.5, -0.25], [-1.0], [-0.5]],
    "token_ids": [[1, 2], [3], [4]],
    "n_tokens": [2, 1, 1],
    "embedding": [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]],
    "reward": [0.5, None, 1.0],
    "finish_reason": ["stop", "length", None],
    "temperature": [1.0] * 3,
    "prompt": ["x", "x", "y"],
    "top_token_ids": [[[1], [2]], [[3]], [[4]]],
    "top_logprobs": [[[-0.5], [-0.5]], [[-1.0]], [[-0.5]]],
}
_ODD = [
    pa.array([1, 2, 3]),
    pa.array([1.5, None, float("nan")]),
    pa.array([None] * 3),
    pa.array([True] * 3),
    pa.array([b"\xff", b"", None]),
    pa.array(["a", None, "b"]),
    pa.array(["a", "b", "c"], pa.large_string()),
    pa.array(["a", "b", "a"]).dictionary_encode(),
    pa.array([[], None, [1.0]]),
    pa.array([[None]] * 3),
    pa.array([[1.0, float("inf")], [float("nan")], [-1.0]]),
    pa.array([[2**40], [-1], [0]]),
    pa.array([{"a": 1}] * 3),
    pa.array([[("a", 1)]] * 3, pa.map_(pa.string(), pa.int64())),
    pa.array([0, 1, 2], pa.timestamp("us")),
    pa.array([1, 2, 3], pa.decimal128(5)),
    pa.array([[1.0, 2.0]] * 3, pa.list_(pa.float16(), 2)),
    pa.array([2**63] * 3, pa.uint64()),
    pa.array([-1, 2**40, 0]),
    pa.array([[[None], []]] * 3, pa.list_(pa.list_(pa.float32()))),
    pa.array([[[2**40]], [None], None], pa.list_(pa.list_(pa.int64()))),
    pa.array([0.0] * 3),
]


def _parquet(draw: Callable[..., Any]) -> Files:
    columns: dict[str, Any] = {name: pa.array(values) for name, values in _COLUMNS.items()}
    if draw(st.booleans()):
        for _ in range(draw(st.integers(1, 3))):
            name = draw(st.sampled_from(list(columns)))
            if draw(st.booleans()):
                columns[name] = draw(st.sampled_from(_ODD))
            elif len(columns) > 1:
                del columns[name]
    stream = io.BytesIO()
    try:
        pq.write_table(pa.table(columns), stream)
    except pa.ArrowException:  # a type that Parquet has no place for
        return {"in.parquet": b""}
    raw = stream.getvalue()
    return {"in.parquet": damage_bytes(draw, raw) if draw(st.booleans()) else raw}


_PROMPTS = (
    b'{"text": "a", "prompt_id": "x", "source": "s"}\n'
    b'{"messages": [{"role": "user", "content": "b"}], "license": "cc0-1.0"}\n'
    b'{"prompt": "c", "prompt_id": 7}\n'
)
_COLOURS = next((DATA / "readers").glob("samples_colours*")).read_bytes()
_BATCH = (DATA / "readers" / "openai_batch_output.jsonl").read_bytes()
_VLLM = (DATA / "readers" / "vllm_batch_output.jsonl").read_bytes()
_INPUT = (DATA / "readers" / "openai_batch_input.jsonl").read_bytes()


def _requests(draw: Callable[..., Any]) -> Files:
    return {"out.jsonl": _BATCH} | _jsonl("requests.jsonl", _INPUT)(draw)


INPUTS: dict[str, Callable[[Callable[..., Any]], Files]] = {
    "parquet": _parquet,
    "paper": _paper,
    "lm-eval": _jsonl("samples_colours_2026-11-21T11-14-57.020158.jsonl", _COLOURS),
    "inspect": _inspect,
    "openai-batch": _jsonl("out.jsonl", _BATCH),
    "vllm-batch": _jsonl("out.jsonl", _VLLM),
    "requests": _requests,
    "prompts": _jsonl("prompts.jsonl", _PROMPTS),
}


def attempt(kind: str, files: Files) -> bool:
    """Whether the input was taken; its refusal by an error of this package is as good."""
    with tempfile.TemporaryDirectory(prefix="canopy-fuzz-") as folder:
        here = Path(folder)
        for name, data in files.items():
            path = here / "in" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        first = here / "in" / next(iter(files))
        try:
            if kind == "prompts":
                read_prompts(first)
                return True
            told: dict[str, Any] = {}
            if kind not in ("parquet", "paper"):
                told = {"family": "f", "variant": "v", "task": "t", "temperature": 1.0}
            if kind == "lm-eval":
                told |= {"tokenizer": TOKENIZER, "top_k": 0}
            if kind == "requests":
                told["requests"] = here / "in" / "requests.jsonl"
            form = {"vllm-batch": "openai-batch", "requests": "openai-batch"}.get(kind, kind)
            source = here / "in" if kind == "paper" else first
            import_rollouts(here / "s", source, format=form, **told)
            return True
        except CanopyError:
            return False


def quicken(patch: Callable[[Any, str, Any], None]) -> None:
    """Leaves out what is slow and not tried here: power cuts, and the views over what is stored."""
    patch(os, "fsync", lambda _: None)
    patch(sql, "write_database", lambda _: None)


def keep(kind: str, files: Files) -> Path:
    """Keeps an input as a seed that test_fuzz.py replays."""
    text = json.dumps({name: base64.b64encode(data).decode() for name, data in files.items()}, indent=1)
    path = SEEDS / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    return path


def seed(path: Path) -> tuple[str, Files]:
    """Kind and files of a kept input."""
    files = {name: base64.b64decode(data) for name, data in json.loads(path.read_text()).items()}
    return path.stem.rpartition("-")[0], files


def fuzz(kind: str, examples: int, counts: Counter[str], **options: Any) -> Files | None:
    """Tries ``examples`` damaged inputs; the simplest one that raised something else, if any."""
    failed: Files | None = None

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        **options,
    )
    @given(st.data())
    def check(data: Any) -> None:
        nonlocal failed
        files = INPUTS[kind](data.draw)
        counts[kind] += 1
        try:
            counts[f"{kind} taken"] += attempt(kind, files)
        except BaseException:
            failed = files
            raise

    try:
        check()
    except Exception:
        if failed is None:
            raise
        traceback.print_exc()
    return failed


def main() -> int:
    """Fuzzes for a while; the exit code is 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--only", choices=list(INPUTS))
    options = parser.parse_args()
    quicken(setattr)
    end, counts, found = time.monotonic() + 60 * options.minutes, Counter[str](), 0
    while time.monotonic() < end:
        for kind in [options.only] if options.only else INPUTS:
            files = fuzz(kind, 40, counts, phases=[Phase.generate])  # the time goes into finding
            if files is not None:
                found += 1
                print(f"{kind}: kept as {keep(kind, files)}", file=sys.stderr)
            if time.monotonic() > end:
                break
    for kind in INPUTS:
        print(f"{kind}: {counts[kind]} inputs, {counts[f'{kind} taken']} of them taken")
    print(f"{sum(counts[k] for k in INPUTS)} inputs, {found} found")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
