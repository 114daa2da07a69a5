"""Reads what lm-evaluation-harness logs with ``--log_samples``: samples_TASK_DATE.jsonl.

A line is a document under a filter, and ``resps`` holds the generations of its one request, as text
alone: there are neither tokens nor log-probabilities of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from canopy_store.errors import DataError
from canopy_store.readers import Row, Told, first_record, get, records


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
    named = re.fullmatch(r"samples_(.+)_\d{4}-\d\d-\d\dT[\d.:-]+", path.stem)
    only = None
    for where, record in records(path):
        shown = get(record, "filter", str, where, "none")
        only = shown if only is None else only
        if shown != only:
            continue
        arguments = get(record, "arguments", dict, where)
        answers = get(record, "resps", list, where)
        if len(answers) != 1 or not isinstance(answers[0], list) or len(arguments) != 1:
            raise DataError(
                f"{where}: resps needs one list of generations, from one request; "
                "a task that scores given answers has no rollouts"
            )
        request = next(iter(arguments.values()))
        settings = get(request, "arg_1", dict, where, {})
        greedy = get(settings, "do_sample", bool, where, None) is False
        temperature = 0.0 if greedy else get(settings, "temperature", (int, float), where, None)
        for sample, text in enumerate(answers[0]):
            if not isinstance(text, str):
                raise DataError(
                    f"{where}: resps holds no text: a task that scores given answers has no rollouts"
                )
            yield {
                "where": f"{where}, response {sample}",
                "task": named and named[1],
                "prompt_id": str(get(record, "doc_id", (int, str), where)),
                "sample": sample,
                "text": text,
                "prompt": get(request, "arg_0", str, where, None),
                "temperature": temperature,
                "top_p": get(settings, "top_p", (int, float), where, None),
                "top_k": get(settings, "top_k", int, where, None),
                "max_new_tokens": get(settings, "max_gen_toks", int, where, None),
            }
