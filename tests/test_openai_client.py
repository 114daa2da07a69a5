"""What a server can do to its client: bytes and time without end, and words that tell the key."""

from __future__ import annotations

import base64
import contextlib
import gzip
import html
import json
import socket
import threading
import time
import tracemalloc
import urllib.parse
import zlib
from collections.abc import Callable, Iterator

import anyio
import pytest

from canopy_store.errors import CanopyError, DataError, UsageError
from canopy_store.ingest import openai_client
from canopy_store.ingest.openai_client import Answer, Server
from canopy_store.ingest.server_text import shown
from canopy_store.readers import get

KEY = "sk-Pr0j 4b'c\"9xYz/T+w=Q~77"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(openai_client, "_FIRST_WAIT", 0.001)
    monkeypatch.setattr(openai_client, "_ATTEMPTS", 2)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@contextlib.contextmanager
def answering(write: Callable[[socket.socket, threading.Event], None]) -> Iterator[str]:
    """The address of a server that lets ``write`` answer each connection as it likes."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.05)

        def serve() -> None:
            while not over.is_set():
                with contextlib.suppress(OSError):
                    connection, _ = listening.accept()
                    with connection:
                        connection.settimeout(5)
                        connection.recv(1 << 16)
                        write(connection, over)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        finally:
            over.set()
            thread.join()


def response(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def saying(data: bytes) -> Callable[[socket.socket, threading.Event], None]:
    return lambda connection, over: connection.sendall(data)


def complete(url: str, most: int = 1 << 20) -> Answer:
    """The answer to a request that asks for nothing."""
    server = Server(url, 1)

    async def ask() -> Answer:
        async with server.client() as client:
            return await server.complete(client, {"prompt": []}, most)

    return anyio.run(ask)


def bomb(size: int) -> bytes:
    """As many zeros in gzip's coding, made without holding them."""
    packer = zlib.compressobj(wbits=31)
    parts = [packer.compress(bytes(1 << 20)) for _ in range(size >> 20)]
    return b"".join([*parts, packer.flush()])


# ---------------------------------------------------------------- bounds


@pytest.mark.parametrize("path", ["completions", "models"])
def test_a_small_body_that_decodes_to_a_large_one_is_not_held(path):
    packed = response(bomb(256 << 20), "Content-Encoding: gzip")
    with answering(saying(packed)) as url:
        tracemalloc.start()
        try:
            with pytest.raises(DataError, match=r"an answer of more than .* bytes"):
                complete(url) if path == "completions" else Server(url, 1).models()
            assert tracemalloc.get_traced_memory()[1] < 64 << 20
        finally:
            tracemalloc.stop()


def test_a_body_without_end_is_left():
    sent = []

    def pour(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not over.is_set():
            connection.sendall(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
            sent.append(1 << 16)

    with answering(pour) as url, pytest.raises(DataError, match="more than 1,048,576 bytes"):
        complete(url)
    assert sum(sent) < 64 << 20


@pytest.mark.parametrize("coding", ["br", "zstd", "deflate", "gzip, gzip"])
def test_a_coding_that_was_not_asked_for_is_refused(coding):
    with (
        answering(saying(response(b"{}", f"Content-Encoding: {coding}"))) as url,
        pytest.raises(CanopyError, match=f"in the coding {coding}, asked for gzip or none"),
    ):
        complete(url)


def test_gzip_is_read_and_cut_gzip_is_not():
    whole = gzip.compress(b'{"choices": []}')
    with answering(saying(response(whole, "Content-Encoding: gzip"))) as url:
        assert complete(url).body == b'{"choices": []}'
    for spoilt in (whole[:-9], b"no gzip"):
        with (
            answering(saying(response(spoilt, "Content-Encoding: gzip"))) as url,
            pytest.raises(CanopyError, match="failed 2 times"),
        ):
            complete(url)


@pytest.mark.parametrize("begin", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\n\r\n{"])
def test_an_answer_that_drips_ends_in_time(monkeypatch, begin):
    monkeypatch.setattr(openai_client, "_LONGEST_ATTEMPT", 0.4)
    monkeypatch.setattr(openai_client, "_LONGEST_LIST", 0.4)

    def drip(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(begin)
        while not over.is_set():
            connection.sendall(b"x")  # a header's name, or a body: never the end of either
            time.sleep(0.05)

    with answering(drip) as url:
        begun = time.monotonic()
        with pytest.raises(CanopyError, match=r"failed 2 times, last with no whole answer in 0.4 sec"):
            complete(url)
        with pytest.raises(CanopyError, match=r"no whole answer in 0.4 seconds\); is the server up"):
            Server(url, 1).models()
        assert time.monotonic() - begun < 5


def test_only_the_beginning_of_a_failure_is_read():
    with answering(saying(response(b"no " * (8 << 20), status="418 I am a teapot"))) as url:
        answer = complete(url)
    assert (answer.status, len(answer.body)) == (418, openai_client._MOST_REFUSED + 1)
    assert len(Server(url, 1).said(answer)) < 340


# ---------------------------------------------------------------- the key

SPELLINGS = {
    "plain": KEY,
    "upper case": KEY.upper(),
    "first half": KEY[: len(KEY) // 2],
    "second half": KEY[len(KEY) // 2 :],
    "middle": KEY[5:17],
    "masked": f"{KEY[:7]}*****{KEY[-8:]}",
    "repr": repr(KEY),
    "json": json.dumps(KEY),
    "html": html.escape(KEY),
    "percent": urllib.parse.quote(KEY, safe=""),
    "every byte percent": "".join(f"%{b:02x}" for b in KEY.encode()),
    "form": urllib.parse.urlencode({"api_key": KEY}),
    "base64": base64.b64encode(KEY.encode()).decode(),
    "base64 of the header": base64.b64encode(f"Bearer {KEY}".encode()).decode(),
    "base64 for a URL": base64.urlsafe_b64encode(b"user:" + KEY.encode()).decode(),
    "base64, half": base64.b64encode(b"ab" + KEY.encode()).decode()[8:28],
    "hex": KEY.encode().hex(" "),
    "split by colours": "\x1b[31m".join(KEY),
    "split by nothing visible": "\u200b".join(KEY),
    "split by lines": "\r\n".join(KEY),
}


def tells(text: str) -> bool:
    """Whether letters and digits of a text repeat four of the key, in any spelling."""
    letters = "".join(c for c in text if c.isascii() and c.isalnum()).lower()
    plain = "".join(c for c in KEY if c.isalnum()).lower()
    spelt = [plain, KEY.encode().hex()]
    spelt += [base64.b64encode(b"x" * n + KEY.encode()).decode().lower()[4:] for n in range(3)]
    spelt = ["".join(c for c in s if c.isalnum()) for s in spelt]
    return any(s[at : at + 4] in letters for s in spelt for at in range(len(s) - 3))


@pytest.mark.parametrize("name", SPELLINGS)
def test_no_part_of_the_key_is_shown_in_any_spelling(name):
    line = shown(f"denied <{SPELLINGS[name]}> ok", KEY)
    assert not tells(line), line
    assert line.startswith("denied <")
    assert line.endswith("> ok")


ESCAPED = {
    "JSON": "".join(f"\\u{ord(c):04x}" for c in KEY),
    "JSON, escaped twice": "".join(f"\\\\u{ord(c):04x}" for c in KEY),
    "JSON, in part": KEY[:3] + "".join(f"\\u{ord(c):04X}" for c in KEY[3:]),
    "JavaScript": "".join(f"\\u{{{ord(c):x}}}" for c in KEY),
    "Python": "".join(f"\\x{ord(c):02x}" for c in KEY),
    "Python, long": "".join(f"\\U{ord(c):08x}" for c in KEY),
    "octal": "".join(f"\\{ord(c):03o}" for c in KEY),
    "HTML": "".join(f"&#{ord(c)};" for c in KEY),
    "HTML, hexadecimal": "".join(f"&#x{ord(c):X};" for c in KEY),
    "bytes": ", ".join(str(b) for b in KEY.encode()),
    "bytes, hexadecimal": ", ".join(f"{b:#x}" for b in KEY.encode()),
    "wide": "".join(chr(ord(c) + 0xFEE0) if c != " " else c for c in KEY),
    "backwards": KEY[::-1],
    "base32": base64.b32encode(KEY.encode()).decode().rstrip("="),
}


@pytest.mark.parametrize("name", ESCAPED)
def test_nothing_of_an_escaped_key_is_shown(name):
    line = shown(f"denied <{ESCAPED[name]}> ok", KEY, longest=1000)
    assert line in ("denied <…> ok", "denied <\\…> ok")  # the first of two backslashes may stay


@pytest.mark.parametrize("before", range(5))
def test_nothing_of_the_key_in_a_longer_base32_is_shown(before):
    text = base64.b32encode(b"\0" * before + KEY.encode()).decode()
    left = shown(text, KEY).replace("…", "").rstrip("=")
    assert len(left) <= 8  # of what stood before it, with a character of which the key has a part


def test_escapes_that_are_not_of_the_key_stay():
    text = r"no \u0041\x42 &#67; \104 &#xffffffff; [1, 22, 333] １２ %zz"
    assert shown(text, KEY) == text


def test_text_that_has_nothing_of_the_key_stays_and_is_short():
    assert shown("model  not\nfound (404)", KEY) == "model not found (404)"
    assert shown("bad key: Bearer s3cret-key", "s3cret-key") == "bad key: Bearer …"
    assert shown("a!!!b", "!!!") == "a…b"
    assert shown("ab: no abc", "ab") == "…: no …c"
    long = shown("word " * 1000)
    assert len(long) == 300
    assert long.endswith("…")


@pytest.mark.parametrize(
    "steering",
    ["\x1b[2J", "\x1b]0;title\x07", "\x1b]8;;http://x\x1b\\", "\x9b31m", "\x07", "\x7f", "\u202e", "\r"],
)
def test_a_servers_words_do_not_steer_the_terminal(steering):
    assert shown(f"be{steering}fore") == ("be fore" if steering == "\r" else "before")
    with answering(saying(response(f"be{steering}fore".encode(), status="400 Bad Request"))) as url:
        server = Server(url, 1)
        with pytest.raises(UsageError) as raised:
            server.body(complete(url))
    assert str(raised.value).isprintable()


def refusals(key: str) -> dict[str, bytes]:
    """Answers that repeat the key, each in another place."""
    quoted = urllib.parse.quote(key)
    message = json.dumps({"error": {"message": f"Incorrect API key provided: {key}"}}).encode()
    invalid = f"Location: http://[{quoted}/"
    return {
        "error": response(message, status="401 Unauthorized"),
        "text": response(f"<p>{html.escape(key)}</p>".encode(), status="403 Forbidden"),
        "fails for good": response(message, status="500 Internal Server Error"),
        "redirect": response(b"", f"Location: http://a/?k={quoted}", status="307 Temporary Redirect"),
        "invalid redirect": response(b"", invalid, status="302 Found"),
        "status line": f"HTTP/9.9 {quoted} what\r\n\r\n".encode(),
        "header": f"HTTP/1.1 200 OK\r\n{key}\r\n\r\n".encode(),
        "coding": response(b"{}", f"Content-Encoding: {quoted}"),
        "not JSON": response(key.encode()),
        "no object": response(json.dumps([key]).encode()),
        "wrong key": response(json.dumps({key: key}).encode()),
    }


@pytest.mark.parametrize("where", refusals(KEY))
def test_no_answer_brings_the_key_into_a_message(monkeypatch, where):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with answering(saying(refusals(KEY)[where])) as url:
        server = Server(url, 1)
        for call in (server.models, lambda: get(server.body(complete(url)), "choices", list, url)):
            with pytest.raises(CanopyError) as raised:
                call()
            assert not tells(str(raised.value).replace(url, "")), raised.value


def test_a_redirect_says_what_to_do():
    with answering(saying(response(b"", "Location: /v2", status="308 Permanent Redirect"))) as url:
        server = Server(url, 1)
        with pytest.raises(UsageError, match="status 308; it sends requests elsewhere: give that addr"):
            server.body(complete(url))


@pytest.mark.parametrize("key", ["sk-sécret1", "sk-\nsecret1", "sk-\x1bsecret1"])
def test_a_key_that_no_header_takes_is_refused_unseen(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UsageError, match="OPENAI_API_KEY: holds a character") as raised:
        Server("http://localhost:1/v1", 1)
    assert "cret1" not in str(raised.value)


def test_an_address_with_the_key_in_it_is_refused_unseen(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret-key")
    with pytest.raises(UsageError, match="with no password in it") as raised:
        Server("http://localhost:1/s3cret-key/v1", 1)
    assert "s3cret" not in str(raised.value)


def test_a_listed_model_that_repeats_the_key_is_none(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    listed = [{"id": f"model {KEY}"}, {"id": "b", "owned_by": KEY}, {"id": "c"}, {"id": 3}, "d"]
    with answering(saying(response(json.dumps({"data": listed}).encode()))) as url:
        assert [entry["id"] for entry in Server(url, 1).models()] == ["c"]
