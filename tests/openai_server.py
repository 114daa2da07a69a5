"""A completions server that samples a Markov chain, and answers as different servers do, or fails.

python tests/openai_server.py PORT '{"kind": "vllm"}' runs it alone.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from chain import CHAIN_LOGITS, STATES

OPENAI = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "logprobs"}


class ChainServer(ThreadingHTTPServer):
    """What it is asked, and how it answers.

    Parameters
    ----------
    kind : vllm (token_ids; the end token among them), vllm-old (``token_id:N``), sglang (the end
        token named beside the texts), llamacpp (a list of objects with ids), openai (texts alone, the
        end token left out; refuses fields it does not know) or proxy (no log-probabilities either)
    models : names it serves
    ends : its end tokens
    failures : per request in turn a status, "hangup" or None; then answers
    always : a status for every request
    key : the API key it wants
    pause : seconds before each answer
    window : tokens of prompt and rollout that it holds
    names : the texts of its tokens
    spoil : changes the choice of an answer before it is sent
    """

    daemon_threads = True

    def __init__(
        self,
        port: int = 0,
        kind: str = "vllm",
        models: tuple[str, ...] = ("chain",),
        ends: tuple[int, ...] = (0,),
        failures: tuple[Any, ...] = (),
        always: int | None = None,
        key: str | None = None,
        pause: float = 0.0,
        window: int | None = None,
        names: list[str] | None = None,
        spoil: Callable[[dict[str, Any]], None] = lambda choice: None,
    ) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.kind, self.models, self.ends, self.key, self.pause = kind, models, ends, key, pause
        self.failures, self.always, self.window = itertools.chain(failures), always, window
        self.names, self.spoil = names or STATES, spoil
        self.asked: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""

    def rollout(self, body: dict[str, Any]) -> tuple[list[int], str]:
        """Token ids, the end token among them, and why they end."""
        logits = CHAIN_LOGITS / (body.get("temperature", 1) or 1e-6)
        if body.get("top_k", -1) > 0:
            edge = np.sort(logits, axis=1)[:, -body["top_k"]][:, None]
            logits = np.where(logits >= edge, logits, -np.inf)
        weight = np.exp(logits - logits.max(axis=1, keepdims=True))
        cumulative = np.cumsum(weight / weight.sum(axis=1, keepdims=True), axis=1)
        draws = np.random.default_rng([body["seed"], *body["prompt"]])
        most = min(body["max_tokens"], (self.window or 10**9) - len(body["prompt"]))
        ends = set(body.get("stop_token_ids") or self.ends)
        state, ids = body["prompt"][-1], []
        while len(ids) < most:
            state = min(int(np.searchsorted(cumulative[state], draws.random(), side="right")), 7)
            ids.append(state)
            if state in ends:
                return ids, "stop"
        return ids, "length"

    def choice(self, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """The choice of an answer and how many tokens it counts."""
        ids, reason = self.rollout(body)
        kept = ids[:-1] if self.kind in ("openai", "proxy") and reason == "stop" else ids
        shown = [i for i in ids if i not in self.ends]
        choice = {"index": 0, "finish_reason": reason, "text": " ".join(self.names[i] for i in shown)}
        before = [body["prompt"][-1], *ids]
        logs = CHAIN_LOGITS - np.log(np.exp(CHAIN_LOGITS).sum(axis=1, keepdims=True))
        tops = [[int(i) for i in np.argsort(-logs[s])[: body["logprobs"]]] for s in before]
        if self.kind == "llamacpp":
            choice["logprobs"] = {
                "content": [
                    {
                        "id": i,
                        "token": self.names[i],
                        "bytes": [*self.names[i].encode()],
                        "logprob": logs[s, i],
                        "top_logprobs": [
                            {"id": t, "token": self.names[t], "logprob": logs[s, t]} for t in top
                        ],
                    }
                    for s, i, top in zip(before, kept, tops, strict=False)
                ]
            }
            return choice, len(kept)
        names = self.names
        if self.kind in ("vllm", "vllm-old") and body.get("return_tokens_as_token_ids"):
            names = [f"token_id:{i}" for i in range(8)]
        if self.kind == "vllm" and body.get("return_token_ids"):
            choice["token_ids"] = ids
        if self.kind in ("vllm", "vllm-old") and body.get("stop_token_ids") and reason == "stop":
            choice["stop_reason"] = ids[-1]
        if self.kind == "sglang":
            choice["matched_stop"] = ids[-1] if reason == "stop" else None
        if self.kind != "proxy":
            choice["logprobs"] = {
                "tokens": [names[i] for i in kept],
                "token_logprobs": [logs[s, i] for s, i in zip(before, kept, strict=False)],
                # the sampled token stands among the tops even where it is none, as at vLLM
                "top_logprobs": [
                    {names[t]: logs[s, t] for t in [*top, i]}
                    for s, i, top in zip(before, kept, tops, strict=False)
                ],
            }
        return choice, len(kept)


class JudgeServer(ChainServer):
    """A chat server that answers with what ``reply`` makes of the last message."""

    def __init__(self, reply: Callable[[str], str | None], **behaviour: Any) -> None:
        super().__init__(**behaviour)
        self.reply = reply

    def choice(self, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        said = self.reply(body["messages"][-1]["content"])
        return {"index": 0, "message": {"role": "assistant", "content": said}}, 1


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: ChainServer
    protocol_version = "HTTP/1.1"  # connections are kept

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def send(self, status: int, body: Any, **headers: str) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def refused(self) -> bool:
        key = self.server.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return False
        self.send(401, {"error": {"message": f"bad key: {self.headers.get('Authorization')}"}})
        return True

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            self.send(404, {"error": {"message": "Not Found"}})
        elif not self.refused():
            kind = self.server.kind.removesuffix("-old")
            self.send(200, {"data": [{"id": name, "owned_by": kind} for name in self.server.models]})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refused():
            return
        with server.lock:
            server.asked.append(body)
            failure = server.always or next(server.failures, None)
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        time.sleep(server.pause)
        with server.lock:
            server.at_once -= 1
        unknown = sorted(set(body) - OPENAI)
        if failure == "hangup":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.close_connection = True
        elif failure:
            self.send(failure, {"error": {"message": "busy"}}, Retry_After="0")
        elif server.kind == "openai" and unknown:
            self.send(400, {"error": {"message": f"Unrecognized request argument: {unknown[0]}"}})
        else:
            choice, count = server.choice(body)
            server.spoil(choice)
            usage = {"completion_tokens": count} if server.kind != "sglang" else {}
            self.send(200, {"choices": [choice], "usage": usage})


@contextlib.contextmanager
def serving(kind_of: type[ChainServer] = ChainServer, **behaviour: Any) -> Iterator[ChainServer]:
    """A server in a thread of its own."""
    with kind_of(**behaviour) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


if __name__ == "__main__":
    ChainServer(int(sys.argv[1]), **json.loads(sys.argv[2])).serve_forever()
