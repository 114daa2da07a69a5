"""Reads the output of a batch of OpenAI's API, or of vLLM's ``run-batch``: JSONL, a request a line.

vLLM adds the token ids themselves where it was asked for ``return_token_ids``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from canopy_store import store
from canopy_store.errors import DataError
from canopy_store.readers import Row, Told, first_record, get, records
from canopy_store.readers.openai_logprobs import (
    Table,
    check_ids,
    log_columns,
    logged_tokens,
    token_table,
)


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


def _choice(choice: dict[str, Any], where: str, table: Table | None) -> dict[str, Any]:
    """Text, token ids and log-probabilities of one choice of a chat or text completion."""
    ids = get(choice, "token_ids", list, where, None)
    check_ids(ids or [], where)
    row: dict[str, Any] = {"token_ids": ids}
    tokens = logged_tokens(choice, where)
    if "message" in choice:
        row["text"] = get(choice, "message.content", str, where, None)
    else:
        row["text"] = get(choice, "text", str, where)
        if tokens and tokens[0].value is None:
            raise DataError(f"{where}: its log-probabilities begin with the prompt; ask without echo")
    if tokens:
        columns = log_columns(tokens, where, table)
        row |= {**columns, "token_ids": columns["token_ids"] if ids is None else ids}
    return row


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
