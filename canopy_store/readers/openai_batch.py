"""Reads the output of a batch of OpenAI's API, or of vLLM's ``run-batch``: JSONL, a request a line.

Log-probabilities come as a list of tokens, each as text (and bytes), or as ``token_id:N`` where vLLM
was asked for ``return_tokens_as_token_ids``; ``return_token_ids`` adds the ids themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from canopy_store import store
from canopy_store.errors import DataError
from canopy_store.readers import Row, Told, first_record, get, records

_UNLIKELY = -9999.0  # the API's word for 'not among the likeliest', no log-probability
_NO_IDS = "the ids of its tokens are not known, or not of all; --tokenizer may tell them"
_LOST = "\ufffd".encode()  # part of a character, which the engine's text has lost


def sniff(path: Path) -> bool:
    """Whether a file's first line answers a batch's request."""
    return path.is_file() and {"custom_id", "response"} <= set(first_record(path))


def read(path: Path, told: Told) -> Iterator[Row]:
    """The choices of every request that succeeded; the others are counted and left out.

    With the requests, a prompt's id follows from its content and requests of one prompt are its
    rollouts; without them the prompt's id is the custom_id.

    Raises
    ------
    DataError
        A line that is no answer to a chat or text completion, or a log-probability that is none.
    """
    asked = dict(_requests(told.requests)) if told.requests else {}
    table = token_table(told.tokenizer)
    samples: Counter[str] = Counter()
    failed: list[str] = []
    for where, record in records(path):
        name = get(record, "custom_id", str, where)
        response = get(record, "response", dict, where, {})
        if get(response, "status_code", int, where, 200) != 200 or not response.get("body"):
            failed.append(where)
            continue
        body = get(response, "body", dict, where)
        choices = get(body, "choices", list, where)
        if told.requests and name not in asked:
            raise DataError(f"{where}: {told.requests} holds no request of custom_id {name!r}")
        shared = {
            "prompt_id": name,
            "model": get(body, "model", str, where, None),
            **asked.get(name, {}),
        }
        for place, choice in enumerate(choices):
            if not isinstance(choice, dict):
                raise DataError(f"{where}: choices needs objects")
            ended = get(choice, "finish_reason", str, where, None)
            if ended == "content_filter":
                failed.append(where)
                continue
            row = {
                **shared,
                "where": f"{where}, choice {place}",
                "sample": samples[shared["prompt_id"]],
                "finish_reason": ended and ("length" if ended == "length" else "stop"),
            }
            samples[shared["prompt_id"]] += 1
            row |= _choice(choice, row["where"], table)
            if len(choices) == 1 and row.get("logprob") is None:
                row["n_tokens"] = get(body, "usage.completion_tokens", int, where, None)
            yield row
    if failed:
        told.say(
            f"{path}: {len(failed)} answers failed or were filtered and are left out, "
            f"first {failed[0].rpartition(': ')[2]}"
        )


def _choice(choice: dict[str, Any], where: str, table: dict[bytes, int] | None) -> dict[str, Any]:
    """Text, token ids and log-probabilities of one choice of a chat or text completion."""
    row: dict[str, Any] = {"token_ids": _ids(get(choice, "token_ids", list, where, None), where)}
    if "message" in choice:
        row["text"] = get(choice, "message.content", str, where, None)
        entries = get(choice, "logprobs.content", list, where, None)
    else:
        row["text"] = get(choice, "text", str, where)
        entries = _legacy(choice, where)
    if entries:
        found = content_logprobs(entries, where, table)
        if row["token_ids"] is None:
            row["token_ids"] = found["token_ids"]
        row |= {key: value for key, value in found.items() if key != "token_ids"}
    return row


def _ids(values: list[Any] | None, where: str) -> list[int] | None:
    if values is not None and not all(type(v) is int for v in values):
        raise DataError(f"{where}: token_ids needs whole numbers")
    return values


def _legacy(choice: dict[str, Any], where: str) -> list[dict[str, Any]] | None:
    """The logprobs of a text completion, in the form of a chat completion's."""
    tokens = get(choice, "logprobs.tokens", list, where, None)
    values = get(choice, "logprobs.token_logprobs", list, where, None)
    if tokens is None or values is None:
        return None
    tops = get(choice, "logprobs.top_logprobs", list, where, None) or [None] * len(tokens)
    if not len(tokens) == len(values) == len(tops):
        raise DataError(f"{where}: logprobs.tokens, token_logprobs and top_logprobs differ in length")
    if values and values[0] is None:
        raise DataError(f"{where}: its log-probabilities begin with the prompt; ask without echo")
    return [
        {
            "token": token,
            "logprob": value,
            "top_logprobs": [{"token": t, "logprob": v} for t, v in top.items()]
            if isinstance(top, dict)
            else None,
        }
        for token, value, top in zip(tokens, values, tops, strict=True)
    ]


def _requests(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a batch's input says of each request: prompt and sampling policy."""
    for where, record in records(path):
        body = get(record, "body", dict, where)
        messages = get(body, "messages", list, where, None)
        row: dict[str, Any] = {
            "temperature": get(body, "temperature", (int, float), where, None),
            "top_p": get(body, "top_p", (int, float), where, None),
            "top_k": get(body, "top_k", int, where, None),
        }
        limits = [get(body, key, int, where, None) for key in ("max_completion_tokens", "max_tokens")]
        row["max_new_tokens"] = next((limit for limit in limits if limit is not None), None)
        if messages is not None:
            row |= chat_prompt(messages, where)
        elif isinstance(text := get(body, "prompt", (str, list), where), str):
            row |= {"prompt_id": store.content_id({"text": text}), "prompt": text}
        else:
            raise DataError(f"{where}: prompt needs one text: one request, one prompt")
        yield get(record, "custom_id", str, where), row


def chat_prompt(messages: list[Any], where: str) -> dict[str, Any]:
    """Id and messages of a chat prompt; without messages where some are not text alone."""
    plain = [
        {"role": m["role"], "content": m["content"]}
        for m in messages
        if isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
    ]
    if len(plain) < len(messages):
        try:
            return {"prompt_id": store.content_id({"messages": messages})}
        except RecursionError:
            raise DataError(f"{where}: messages are nested too deeply") from None
    return {"prompt_id": store.content_id({"messages": plain}), "messages": store.canonical(plain)}


# ---------------------------------------------------------------- log-probabilities


def content_logprobs(
    entries: Sequence[Any], where: str, table: dict[bytes, int] | None
) -> dict[str, Any]:
    """logprob, token_ids, top_logprobs and top_token_ids of a list of logged tokens.

    Ids are None where neither the source nor ``table`` (token text to id) has them. The tops go with
    them: a log-probability of an unknown token says nothing.

    Raises
    ------
    DataError
        An entry that is none, or a token that the table does not have.
    """
    values, ids, top_ids, top_values = [], [], [], []
    for step, entry in enumerate(entries, 1):
        at = f"{where}: token {step}"
        value = get(entry, "logprob", (int, float), at)
        if value == _UNLIKELY:
            raise DataError(f"{at}: logprob {value:.0f} says that it is not known; remove the answer")
        values.append(value)
        ids.append(_token_id(entry, at, table))
        if table is not None and ids[-1] is None:
            raise DataError(
                f"{at}: {entry.get('token')!r} is not one token of the tokenizer alone; log "
                "ids (vLLM: return_token_ids), or import without --tokenizer"
            )
        tops = [
            (-get(top, "logprob", (int, float), at), _token_id(top, at, table))
            for top in get(entry, "top_logprobs", list, at, [])
        ]
        tops = sorted((t for t in tops if -t[0] != _UNLIKELY), key=lambda t: t[0])
        top_ids.append([token for _, token in tops])
        top_values.append([-value for value, _ in tops])
    known = all(i is not None for i in ids)
    whole = any(top_ids) and all(None not in row for row in top_ids)
    lost = any(top_ids) and not whole
    return {
        "logprob": values,
        "left_out": {"top_logprobs": _NO_IDS} if lost else {},
        "raw_logprobs": True,
        "token_ids": ids if known else None,
        "top_token_ids": top_ids if whole else None,
        "top_logprobs": top_values if whole else None,
    }


def _token_id(entry: Any, where: str, table: dict[bytes, int] | None) -> int | None:
    token = get(entry, "token", str, where)
    number = token.removeprefix("token_id:")
    if number != token and number.isdecimal() and len(number) < 10:
        return int(number)
    if table is None:
        return None
    given = get(entry, "bytes", list, where, None)
    if given is None:
        raw = token.encode(errors="replace")
    elif all(type(b) is int and 0 <= b < 256 for b in given):
        raw = bytes(given)
    else:
        raise DataError(f"{where}: bytes needs numbers from 0 to 255")
    return None if _LOST in raw else table.get(raw)


def token_table(tokenizer: Any) -> dict[bytes, int] | None:
    """Each token's id by the bytes of its text, of tokens that no other shares them with."""
    if tokenizer is None:
        return None
    table: dict[bytes, int] = {}
    shared: set[bytes] = set()
    for token, number in tokenizer.get_vocab().items():
        raw = tokenizer.convert_tokens_to_string([token]).encode(errors="replace")
        shared.update({raw} & table.keys())
        table[raw] = number
    return {raw: number for raw, number in table.items() if raw not in shared}
