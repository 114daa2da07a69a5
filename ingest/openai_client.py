"""The client of a server with OpenAI's API: one bounded answer a request, asked for again on failure."""

from __future__ import annotations

import email.utils
import json
import os
import random
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
import httpx2
from anyio.from_thread import start_blocking_portal

from canopy_store.errors import CanopyError, DataError, UsageError
from canopy_store.ingest.server_text import holds_key, shown
from canopy_store.readers import get, parse

T = TypeVar("T")

_PASSING = {408, 409, 425, 429, 500, 502, 503, 504}  # statuses that a later attempt may not meet
_ATTEMPTS = 8
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0  # seconds; doubled from attempt to attempt
_LONGEST_ASKED = 600.0  # seconds of a Retry-After that are waited for
# Seconds for one attempt, from the connection to the last byte: a long rollout in a long queue.
_LONGEST_ATTEMPT = 1800.0
_LONGEST_LIST = 30.0  # seconds for the list of models
_CONNECT = 10.0  # seconds, within the above
_MOST_LISTED = 16 << 20  # bytes of the list of models
_MOST_ANSWERED = 4 << 20  # bytes of a chat's answer
_MOST_REFUSED = 64 << 10  # bytes read of an answer that is a failure


@dataclass(frozen=True)
class Answer:
    """Status, the seconds that the server asks to wait, and the decoded body of an answer."""

    status: int
    wait: float
    body: bytes


class _NoAnswerError(Exception):
    """No whole answer came; says why, fit to be shown."""


class Server:
    """An address, the key for it, and what to do when it fails.

    Parameters
    ----------
    base_url : as in http://localhost:8000/v1
    concurrency : requests at once

    Raises
    ------
    UsageError
        An address that is none or has a password in it, or a key that no header takes.
    """

    def __init__(self, base_url: str, concurrency: int) -> None:
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise UsageError("OPENAI_API_KEY: holds a character that is no part of a key; set it again")
        try:
            url = httpx2.URL(base_url)
        except httpx2.InvalidURL:
            url = httpx2.URL("")
        secret = url.userinfo or url.query or (len(self.key) >= 8 and holds_key(base_url, self.key))
        if url.scheme not in ("http", "https") or not url.host or secret:
            raise UsageError(
                "--base-url: needs an address like http://HOST:8000/v1, with no password "
                "in it: a key goes in the environment as OPENAI_API_KEY"
            )
        self.url, self.concurrency = base_url.rstrip("/"), concurrency

    def shown(self, text: object, longest: int = 300) -> str:
        """What the server said, short, without control codes and without the key."""
        return shown(str(text), self.key, longest)

    def client(self) -> httpx2.AsyncClient:
        """A client with as many connections as there are requests."""
        headers = {"Accept-Encoding": "gzip"}  # the one coding that `_read` decodes
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        return httpx2.AsyncClient(
            base_url=self.url + "/",
            timeout=httpx2.Timeout(None, connect=_CONNECT),  # the rest is bounded in `_ask`
            headers=headers,
            limits=httpx2.Limits(
                max_connections=self.concurrency, max_keepalive_connections=self.concurrency
            ),
        )

    def models(self) -> list[dict[str, Any]]:
        """The models that the server lists, each with a text ``id``; none where it has no such list.

        Raises
        ------
        CanopyError
            The server does not answer.
        """

        async def ask() -> Answer:
            async with self.client() as client:
                return await self._ask(client, "GET", "models", None, _LONGEST_LIST, _MOST_LISTED)

        try:
            with start_blocking_portal() as portal:
                answer = portal.call(ask)
        except _NoAnswerError as error:
            raise CanopyError(f"{self.url}: no answer ({error}); is the server up?") from None
        if answer.status == 404:
            return []
        entries = get(self.body(answer), "data", list, f"{self.url}/models")
        named = [e for e in entries if isinstance(e, dict) and isinstance(e.get("id"), str)]
        # id and owner are stored with the run
        return [e for e in named if not holds_key(f"{e['id']} {e.get('owned_by')}", self.key)]

    def served(self, names: list[str], wanted: str | None) -> str:
        """The model to ask for, of those the server lists; an empty list is a server that lists none.

        Raises
        ------
        UsageError
            No such model, or several and none wanted.
        """
        shown = ", ".join(self.shown(name, 80) for name in names[:20])
        if wanted is not None:
            if names and wanted not in names:
                raise UsageError(f"--served-model {wanted}: {self.url} serves {shown}")
            return wanted
        if len(names) == 1:
            return names[0]
        if not names:
            raise UsageError(f"{self.url} lists no models: name one with --served-model")
        raise UsageError(f"{self.url} serves {shown}: choose one with --served-model")

    async def complete(
        self, client: httpx2.AsyncClient, body: dict[str, Any], most: int, path: str = "completions"
    ) -> Answer:
        """The answer to a request, asked for again while the server fails in ways that pass.

        Parameters
        ----------
        most : bytes that the decoded answer may have
        path : below the server's address: completions, or chat/completions

        Raises
        ------
        CanopyError
            It failed `_ATTEMPTS` times.
        DataError
            The answer is longer than ``most``.
        """
        said, asked = "", 0.0  # what the server said last, and the seconds it asks to wait
        for attempt in range(_ATTEMPTS):
            if attempt:
                wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (attempt - 1))
                await anyio.sleep(max(asked, random.uniform(0.5, 1) * wait))
            try:
                answer = await self._ask(client, "POST", path, body, _LONGEST_ATTEMPT, most)
            except _NoAnswerError as error:
                said, asked = str(error), 0.0
                continue
            if answer.status not in _PASSING:
                return answer
            said, asked = self.said(answer), answer.wait
        raise CanopyError(
            f"{self.url}: failed {_ATTEMPTS} times, last with {said}; what was stored is "
            "whole: run the same command again to resume"
        )

    def each(
        self, bodies: Sequence[dict[str, Any]], read: Callable[[dict[str, Any]], T], path: str
    ) -> list[T]:
        """What ``read`` makes of the answer to each request, in order; ``concurrency`` at a time.

        Raises
        ------
        CanopyError, DataError, UsageError
            As `complete` and `body`, of the first that failed; the others are ended.
        """
        answers: list[Any] = [None] * len(bodies)

        async def one(place: int, client: httpx2.AsyncClient, limit: anyio.Semaphore) -> None:
            async with limit:
                answer = await self.complete(client, bodies[place], _MOST_ANSWERED, path)
            answers[place] = read(self.body(answer))

        async def every() -> None:
            limit = anyio.Semaphore(self.concurrency)
            async with self.client() as client:
                try:
                    async with anyio.create_task_group() as group:
                        for place in range(len(bodies)):
                            group.start_soon(one, place, client, limit)
                except ExceptionGroup as errors:
                    raise errors.exceptions[0] from None

        # a loop in a thread of its own: it also runs where one is running already, as in a notebook
        with start_blocking_portal() as portal:
            portal.call(every)
        return answers

    async def _ask(
        self, client: httpx2.AsyncClient, method: str, path: str, body: Any, seconds: float, most: int
    ) -> Answer:
        """One attempt, of ``seconds`` and ``most`` bytes in all; of a failure only the beginning."""
        try:
            with anyio.fail_after(seconds):
                async with client.stream(method, path, json=body) as response:
                    status = response.status_code
                    data = await _read(response, most if status == 200 else _MOST_REFUSED)
        except TimeoutError:
            raise _NoAnswerError(f"no whole answer in {seconds:g} seconds") from None
        except (httpx2.RequestError, httpx2.InvalidURL, zlib.error) as error:
            raise _NoAnswerError(self.shown(error, 200) or type(error).__name__) from None
        if status == 200 and len(data) > most:
            raise DataError(f"{self.url}: an answer of more than {most:,} bytes: it is no completion")
        return Answer(status, _retry_after(response.headers.get("retry-after", "")), data)

    def body(self, answer: Answer) -> dict[str, Any]:
        """The object that an answer holds.

        Raises
        ------
        UsageError
            The server refused; says what it said.
        DataError
            The answer is no JSON object.
        """
        if answer.status != 200:
            hint = _REDIRECTED if 300 <= answer.status < 400 else _HINTS.get(answer.status, "")
            raise UsageError(f"{self.url}: {self.said(answer)}{hint}")
        body = parse(answer.body, self.url)
        if not isinstance(body, dict):
            raise DataError(f"{self.url}: the answer needs to be a JSON object")
        return body

    def said(self, answer: Answer) -> str:
        """Status and message of a failure, on one line, without the key."""
        try:
            body = json.loads(answer.body)
        except (ValueError, RecursionError):
            body = answer.body.decode(errors="replace")
        for name in ("error", "message", "detail"):
            if isinstance(body, dict) and body.get(name):
                body = body[name]
        text = self.shown(body)
        return f"status {answer.status}" + (f" ({text})" if text else "")


_HINTS = {
    401: "; put the server's key in the environment as OPENAI_API_KEY",
    403: "; put the server's key in the environment as OPENAI_API_KEY",
    404: "; --base-url needs the part before /completions, most often ending in /v1",
}
_REDIRECTED = "; it sends requests elsewhere: give that address as --base-url"


async def _read(response: httpx2.Response, most: int) -> bytes:
    """The decoded body, or its first ``most`` + 1 bytes; never more are held, whatever is sent.

    Raises
    ------
    httpx2.DecodingError
        A coding that was not asked for, or a body that is cut.
    """
    coding = response.headers.get("content-encoding", "identity").strip().lower()
    coding = coding.removeprefix("x-")
    if coding not in ("identity", "gzip"):
        raise httpx2.DecodingError(f"an answer in the coding {coding}, asked for gzip or none")
    unzip = zlib.decompressobj(zlib.MAX_WBITS | 16) if coding == "gzip" else None
    data = bytearray()
    async for part in response.aiter_raw():
        room = most + 1 - len(data)
        data += unzip.decompress(part, room) if unzip else part[:room]
        if len(data) > most:
            return bytes(data)
    if unzip and not unzip.eof:
        raise httpx2.DecodingError("an answer that is cut")
    return bytes(data)


def _retry_after(value: str) -> float:
    """Seconds that a Retry-After asks to wait: it has seconds or a date."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return min(max(seconds, 0.0), _LONGEST_ASKED) if seconds == seconds else 0.0
