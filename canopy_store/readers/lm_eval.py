"""Reads what lm-evaluation-harness logs with ``--log_samples``: samples_TASK_DATE.jsonl.

A line is a document under a filter. Of a task that generates, ``resps`` holds the generations of its one
request, as text alone: there are neither tokens nor log-probabilities of them. Of a multiple-choice task
it holds the log-probability of each given answer: `read_options` makes items of these.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from canopy_store.errors import DataError
from canopy_store.readers import LONGEST, TOP_K_50, Row, Told, first_record, get, parse, records
from canopy_store.store.items import option_rows

_SCORED = "a task that scores given answers has no rollouts; canopy import makes items of it"


_NAMED = r"samples_(.+)_(\d{4}-\d\d-\d\dT[\d.:-]+)"


def task_of(path: Path) -> str | None:
    """The task, as a file's name tells it."""
    named = re.fullmatch(_NAMED, path.stem)
    return named and named[1]


def _top_k_unsure(path: Path) -> str | None:
    """Why top-k may be on where a sample names none; the results beside the samples tell the engine."""
    named = re.fullmatch(_NAMED, path.stem)
    results = path.with_name(f"results_{named[2]}.json") if named else path
    if results == path or not results.is_file():
        return (
            "the log names neither its engine (no results file of the same date is beside it) nor "
            "top-k, and the hf engine keeps the 50 likeliest tokens unless it is told otherwise"
        )
    try:
        with open(results, "rb") as file:
            content = parse(file.read(LONGEST + 1), str(results))
    except OSError as error:
        raise DataError(f"{results}: cannot be read: {error.strerror}") from None
    engine = get(content, "config.model", str, str(results))
    return TOP_K_50 if engine == "huggingface" or engine.startswith("hf") else None


def sniff(path: Path) -> bool:
    """Whether a file's first line is a logged sample."""
    return path.is_file() and {"doc_id", "resps", "arguments"} <= set(first_record(path))


def read(path: Path, told: Told) -> Iterator[Row]:
    """The generations of every document, once each: a second filter shows the same ones again.

    The prompt's id is doc_id; the task, unless given, comes from the file's name.

    Raises
    ------
    DataError
        A line that is no sample, or one of a task that scores given answers.
    """
    task, unsure = task_of(path), _top_k_unsure(path)
    only = None
    for where, record in records(path):
        shown = get(record, "filter", str, where, "none")
        only = shown if only is None else only
        if shown != only:
            continue
        arguments = get(record, "arguments", dict, where)
        answers = get(record, "resps", list, where)
        if len(answers) != 1 or not isinstance(answers[0], list) or len(arguments) != 1:
            raise DataError(f"{where}: resps needs one list of generations, from one request; {_SCORED}")
        request = next(iter(arguments.values()))
        settings = get(request, "arg_1", dict, where, {})
        greedy = get(settings, "do_sample", bool, where, None) is False
        temperature = 0.0 if greedy else get(settings, "temperature", (int, float), where, None)
        for sample, text in enumerate(answers[0]):
            if not isinstance(text, str):
                raise DataError(f"{where}: resps holds no text: {_SCORED}")
            yield {
                "where": f"{where}, response {sample}",
                "task": task,
                "prompt_id": str(get(record, "doc_id", (int, str), where)),
                "sample": sample,
                "text": text,
                "prompt": get(request, "arg_0", str, where, None),
                "temperature": temperature,
                "top_p": get(settings, "top_p", (int, float), where, None),
                "top_k": get(settings, "top_k", int, where, None),
                "top_k_unsure": unsure,
                "max_new_tokens": get(settings, "max_gen_toks", int, where, None),
            }


# ---------------------------------------------------------------- given answers


@dataclass(frozen=True)
class Choice:
    """A document of a multiple-choice task.

    Parameters
    ----------
    item : the rows of its options, as ``items`` has them
    sums : log-probability of each option, nats
    neutral_sums : after no prompt, where the task measures acc_mutual_info
    logged : what the harness made of it: acc, acc_norm, acc_mutual_info, where it did
    """

    item: list[dict[str, Any]]
    sums: list[float]
    neutral_sums: list[float] | None
    logged: dict[str, float] = field(default_factory=dict)


def holds_options(path: Path) -> bool:
    """Whether a file's first line is a logged sample of given answers, each with a log-probability."""
    first = first_record(path) if path.is_file() else {}
    answers = first.get("resps")
    try:
        return sniff(path) and isinstance(answers[0][0], list)  # type: ignore[index]
    except (TypeError, IndexError, KeyError):
        return False


def read_options(path: Path) -> Iterator[Choice]:
    """The documents of a multiple-choice task, once each, with the log-probabilities of their options.

    Options are as the harness scored them, the space before them included. The right one is what
    ``target`` says, by number or by text; a task with a prompt for each option tells it by ``acc``
    alone, which of two options is enough.

    Raises
    ------
    DataError
        A line that is no such sample, or that does not tell the right option; names file and line.
    """
    only = None
    for where, record in records(path):
        shown = get(record, "filter", str, where, "none")
        only = shown if only is None else only
        if shown == only:
            yield _choice(record, where)


def _choice(record: dict[str, Any], where: str) -> Choice:
    pairs = _arguments(record, where)
    sums = [_logprob(answer, where) for answer in get(record, "resps", list, where)]
    if len(sums) != len(pairs):
        raise DataError(f"{where}: {len(pairs)} arguments and {len(sums)} resps, needs one of each")
    names = ("acc", "acc_norm", "acc_mutual_info")
    logged = {name: get(record, name, (int, float), where, None) for name in names}
    n = len(pairs)
    neutral = None
    if logged["acc_mutual_info"] is not None and n % 2 == 0:  # the second half stands after nothing
        n //= 2
        neutral = sums[n:]
    if n < 2:
        raise DataError(f"{where}: one answer, and nothing to choose from; not a multiple-choice task")
    prompts, texts = [pair[0] for pair in pairs[:n]], [pair[1] for pair in pairs[:n]]
    answer = _right(record, texts, sums[:n], logged["acc"], where)
    item_id = str(get(record, "doc_id", (int, str), where))
    item = option_rows(item_id, texts, answer, prompts=prompts)
    known = {name: float(value) for name, value in logged.items() if value is not None}
    return Choice(item, sums[:n], neutral, known)


def _arguments(record: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """What each request put before its answer, and the answer; older versions have a list of lists."""
    arguments = get(record, "arguments", (dict, list), where)
    if isinstance(arguments, dict):
        arguments = [
            (get(each, "arg_0", str, where), get(each, "arg_1", str, where))
            for each in arguments.values()
        ]
    for each in arguments:
        if len(each) < 2 or not all(isinstance(text, str) for text in each[:2]):
            raise DataError(f"{where}: arguments needs a prompt and an answer for each request")
    return [(each[0], each[1]) for each in arguments]


def _logprob(answer: Any, where: str) -> float:
    """The log-probability of a request's answer: [[value, greedy]]."""
    try:
        value = float(answer[0][0])
    except (TypeError, ValueError, IndexError, KeyError):
        raise DataError(f"{where}: resps needs a log-probability for each answer") from None
    if not -float("inf") < value < 1e-3:  # what float32 may leave above 0
        raise DataError(f"{where}: resps holds {value}, which is no log-probability")
    return min(value, 0.0)


def _right(
    record: dict[str, Any], texts: Sequence[str], sums: Sequence[float], acc: float | None, where: str
) -> int:
    """The number of the right option."""
    target = get(record, "target", (str, int, list), where, "")
    target = target[0] if isinstance(target, list) and len(target) == 1 else target
    if isinstance(target, list):
        raise DataError(f"{where}: {len(target)} right options in target; an item has one")
    by_text = [number for number, text in enumerate(texts) if text.strip() == str(target).strip()]
    if str(target).isdecimal() and int(target) < len(texts):
        return int(target)  # as the harness reads a number, whatever the options are
    if len(by_text) == 1:
        return by_text[0]
    chosen = max(range(len(sums)), key=sums.__getitem__)  # the first of several alike, as the harness
    if acc == 1:
        return chosen
    if acc == 0 and len(texts) == 2:
        return 1 - chosen
    raise DataError(f"{where}: target {str(target)[:40]!r} is neither the number nor text of one option")
