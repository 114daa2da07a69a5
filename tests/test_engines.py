"""Rollouts from a server with OpenAI's completions API, against chains in closed form."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from chain import CHAIN_LOGITS, PROMPTS_TO_A, STATES, chain_policy, closed_form, save_chain
from openai_server import serving
from stores import rollouts, write_prompts

import canopy_store
from canopy_store import store
from canopy_store.ingest import openai_client

KINDS = ("vllm", "vllm-old", "sglang", "llamacpp", "openai")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Retries at once, and no key of the environment's."""
    monkeypatch.setattr(openai_client, "_FIRST_WAIT", 0.001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(scope="session")
def chain(tmp_path_factory) -> Path:
    """The Markov chain model, with every state but the end a plain token."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = save_chain(tmp_path_factory.mktemp("chain"))
    words = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    state = json.loads(words.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] == "<eos>"]
    words = type(words).from_str(json.dumps(state))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path) -> Path:
    return write_prompts(tmp_path / "p.jsonl", "a b", "g", "c d e a b", "f c")


def arguments(root: Path, model: Path, url: str, prompts: Path, *more: object) -> list[object]:
    return [
        "ingest",
        "rollouts",
        "--store",
        root,
        "--model",
        model,
        "--family",
        "f",
        "--variant",
        "base",
        "--task",
        "t",
        "--prompts",
        prompts,
        "--engine",
        "openai",
        "--base-url",
        url,
        "--samples",
        6,
        "--max-new-tokens",
        20,
        "--prompts-per-shard",
        1,
        *more,
    ]


# ---------------------------------------------------------------- what is stored


@pytest.mark.parametrize(("kind", "temperature", "top_k"), [("vllm", 1.0, 0), ("llamacpp", 1.5, 6)])
def test_rescored_by_its_own_model_a_servers_run_matches_the_closed_form(
    tmp_path, chain, canopy, kind, temperature, top_k
):
    prompts = write_prompts(tmp_path / "p.jsonl", *PROMPTS_TO_A)
    root, samples = tmp_path / "s", 100
    with serving(kind=kind) as server:
        code, _, err = canopy(
            *arguments(
                root,
                chain,
                server.url,
                prompts,
                "--samples",
                samples,
                "--max-new-tokens",
                500,
                "--temperature",
                temperature,
                "--top-k",
                top_k,
                "--prompts-per-shard",
                5,
            )
        )
    assert code == 0, err
    stored = rollouts(root)
    assert len(stored) == len(PROMPTS_TO_A) * samples
    assert stored["entropy"].null_count() == len(stored)  # never made up from a short list
    whole = kind == "vllm"  # only there is the policy the model's and every token logged
    assert stored["logprob"].null_count() == (0 if whole else len(stored))
    code, _, err = canopy(
        "ingest", "score", "--store", root, "--scorer", chain, "--device", "cpu", "--batch-size", 500
    )
    assert code == 0, err
    if whole:  # what the server logged is what rescoring finds
        scored = canopy_store.read(root, "scores").sort("prompt_id", "sample")
        logged, found = (frame["logprob"].explode().to_numpy() for frame in (stored, scored))
        assert np.abs(logged - found).max() < 1e-5
    truth = closed_form(chain_policy(temperature, top_k), start=1)
    full = canopy_store.read(root, "rollout_metrics")
    for column, name in (
        ("entropy_sum", "ce_star"),
        ("surprisal_sum", "ce_star"),
        ("n_tokens", "mean_length"),
        ("stop_entropy_sum", "stop_entropy"),
    ):
        values = full[column].to_numpy().astype(float)
        error = values.std(ddof=1) / np.sqrt(len(values))
        assert abs(values.mean() - truth[name]) < 4 * error, column
    check = canopy_store.read(root, "logging_check").row(0, named=True)
    assert check["ok"]
    pooled = canopy_store.read(root, "model_metrics").row(0, named=True)
    assert pooled["ce_star"] == pytest.approx(full["entropy_sum"].mean(), rel=1e-12)
    for view in ("rollout_metrics", "prompt_metrics", "model_metrics", "logging_check"):
        frame = canopy_store.read(root, view).select(pl.selectors.float())
        assert not any(frame[name].is_nan().any() for name in frame.columns), view


def test_every_servers_answers_are_read_to_the_same_tokens(tmp_path, chain, canopy, prompts):
    frames = {}
    for kind in KINDS:
        with serving(kind=kind) as server:
            code, _, err = canopy(
                *arguments(tmp_path / kind, chain, server.url, prompts, "--top-logprobs", 3)
            )
            assert code == 0, err
            # a server that knows only OpenAI's fields is asked in these alone, and that is said
            assert ("takes none of the fields" in err) == (kind == "openai")
        frames[kind] = rollouts(tmp_path / kind)
    first = frames["vllm"]
    assert set(first["finish_reason"]) == {"stop", "length"}
    for row in first.iter_rows(named=True):
        assert (row["token_ids"][-1] == 0) == (row["finish_reason"] == "stop")
        assert row["n_tokens"] == len(row["token_ids"])
        assert row["text"] == " ".join(STATES[i] for i in row["token_ids"] if i)
        for ids, values in zip(row["top_token_ids"], row["top_logprobs"], strict=True):
            assert len(ids) == len(values) == 3  # the sampled token comes beside them, and is dropped
            assert values == sorted(values, reverse=True)
    same = ["prompt_id", "sample", "token_ids", "n_tokens", "finish_reason", "text"]
    for kind, frame in frames.items():
        assert frame.select(same).equals(first.select(same)), kind
    settings = json.loads(canopy_store.read(tmp_path / "vllm", "runs")["settings"][0])
    assert settings["top_logprobs_of"] == "server"
    assert (settings["server"], settings["served_model"]) == ("vllm", "chain")
    # the end token that llama.cpp logs and OpenAI leaves out: its list is empty, and no logprob is told
    assert frames["llamacpp"]["top_token_ids"].equals(first["top_token_ids"])
    assert frames["openai"]["logprob"].null_count() == 24
    assert frames["sglang"]["top_token_ids"].null_count() == 24  # its texts have no ids


def test_seeds_follow_from_the_rollout_and_the_policy_is_asked_in_full(tmp_path, chain, canopy, prompts):
    asked = []
    for name in ("one", "two"):
        with serving() as server:
            line = arguments(
                tmp_path / name,
                chain,
                server.url,
                prompts,
                "--concurrency",
                3,
                "--top-k",
                5,
                "--top-p",
                0.9,
                "--temperature",
                0.7,
            )
            assert canopy(*line)[0] == 0
            asked.append(sorted(server.asked, key=lambda body: (body["prompt"], body["seed"])))
            assert server.most_at_once <= 3
    assert asked[0] == asked[1]
    assert len({(*body["prompt"], body["seed"]) for body in asked[0]}) == 24
    body = asked[0][0]
    assert (body["temperature"], body["top_k"], body["top_p"]) == (0.7, 5, 0.9)
    # a server's own defaults must not get in
    assert (body["min_p"], body["repetition_penalty"]) == (0.0, 1.0)
    assert body["samplers"] == ["temperature", "top_k", "top_p"]
    assert rollouts(tmp_path / "one").equals(rollouts(tmp_path / "two"))


def test_requests_run_side_by_side(tmp_path, chain, canopy, prompts):
    with serving(pause=0.1) as server:
        line = arguments(
            tmp_path / "s",
            chain,
            server.url,
            prompts,
            "--samples",
            32,
            "--prompts-per-shard",
            4,
            "--concurrency",
            16,
        )
        assert canopy(*line)[0] == 0
        assert 12 <= server.most_at_once <= 16


def test_tokens_put_outside_the_policy_by_rounding_break_no_view(tmp_path, chain, canopy, prompts):
    root = tmp_path / "s"
    with serving() as server:
        assert canopy(*arguments(root, chain, server.url, prompts, "--top-k", 6))[0] == 0
    assert canopy("ingest", "score", "--store", root, "--scorer", chain)[0] == 0
    file = sorted((root / "scores").rglob("part-*.parquet"))[0]
    scores = store.read_rows(file).to_pydict()
    scores["logprob"][0][0] = float("-inf")
    scores["surprisal_sum"][0] = float("inf")
    store.write_rows(file, "scores", scores)
    for view in ("rollout_metrics", "prompt_metrics", "model_metrics", "logging_check"):
        frame = canopy_store.read(root, view).select(pl.selectors.float())
        for name in frame.columns:
            assert frame[name].drop_nulls().is_finite().all(), f"{view}.{name}"
    assert canopy_store.read(root, "logging_check")["n_rollouts"].to_list() == [23]
    assert canopy_store.read(root, "rollout_metrics")["entropy_sum"].null_count() == 0


def test_texts_that_leave_the_ids_in_doubt_give_none(tmp_path, chain, canopy, prompts):
    part = [*STATES[:7], "\ufffd"]  # how part of a character is shown
    for kind, names in (("openai", part), ("proxy", None)):
        with serving(kind=kind, names=names) as server:
            code, _, err = canopy(*arguments(tmp_path / kind, chain, server.url, prompts))
        assert code == 0, err
        assert err.count("entropies of these rollouts cannot be found") == 1
        stored = rollouts(tmp_path / kind)
        assert set(stored["finish_reason"]) == {"stop", "length"}
        assert (stored["n_tokens"] >= 1).all()
    stored = rollouts(tmp_path / "proxy")
    assert stored["token_ids"].null_count() == stored["logprob"].null_count() == 24
    assert stored["text"].str.len_chars().max() > 3
    code, _, err = canopy("ingest", "score", "--store", tmp_path / "proxy", "--scorer", chain)
    assert code == 1
    assert "no token ids are stored" in err


def test_a_tokenizer_alone_will_do_and_the_name_completes_the_run(tmp_path, chain, canopy, prompts):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in chain.glob("tokenizer*"):
        shutil.copy(file, bare)
    root = tmp_path / "s"
    with serving() as server:
        assert canopy(*arguments(root, bare, server.url, prompts))[0] == 0
    assert canopy_store.read(root, "models")["weights_sha256"].to_list() == [None]
    assert canopy("ingest", "score", "--store", root, "--scorer", chain, "--name", "f/base")[0] == 0
    metrics = canopy_store.read(root, "model_metrics").row(0, named=True)
    assert metrics["ce_star"] > 0
    assert canopy_store.read(root, "logging_check")["ok"].to_list() == [True]


def test_other_weights_do_not_complete_a_run(tmp_path, chain, canopy, prompts):
    other = save_chain(tmp_path / "other", CHAIN_LOGITS * 0.9)
    for file in chain.glob("tokenizer*"):
        shutil.copy(file, other)
    root = tmp_path / "s"
    with serving() as server:
        assert canopy(*arguments(root, chain, server.url, prompts))[0] == 0
    code, _, err = canopy("ingest", "score", "--store", root, "--scorer", other, "--name", "f/base")
    assert code == 2
    assert "f/base is stored with other weights" in err


# ---------------------------------------------------------------- failures


def test_failures_that_pass_are_retried(tmp_path, chain, canopy, prompts):
    with serving() as server:
        assert canopy(*arguments(tmp_path / "whole", chain, server.url, prompts))[0] == 0
    failures = (429, None, 500, "hangup", None, 503, 503, "hangup", 429, 502)
    with serving(failures=failures) as server:
        code, _, err = canopy(*arguments(tmp_path / "failing", chain, server.url, prompts))
        assert code == 0, err
        assert len(server.asked) == 24 + 8
    assert rollouts(tmp_path / "failing").equals(rollouts(tmp_path / "whole"))


def test_a_server_that_fails_for_good_is_named_and_the_run_resumes(tmp_path, chain, canopy, prompts):
    root = tmp_path / "s"
    broken = itertools.chain([None] * 15, itertools.repeat(500))
    with serving(failures=broken) as server:
        line = arguments(root, chain, server.url, prompts, "--concurrency", 2)
        code, _, err = canopy(*line)
        assert code == 1
        assert err.strip().splitlines()[-1] == (
            f"canopy: {server.url}: failed 8 times, last with status 500 (busy); what was stored is "
            "whole: run the same command again to resume"
        )
    with serving() as server:  # another address: a server may move
        code, _, err = canopy(*arguments(root, chain, server.url, prompts))
        assert code == 0, err
        assert len(server.asked) == 12  # two shards of four were stored
        assert canopy(*arguments(tmp_path / "whole", chain, server.url, prompts))[0] == 0
    assert rollouts(root).equals(rollouts(tmp_path / "whole"))
    with serving(models=("other",)) as server:  # but not become another model's
        code, _, err = canopy(*arguments(root, chain, server.url, prompts))
        assert code == 1
        assert "served_model (stored 'chain', asked 'other')" in err


def test_retry_after_is_waited_for():
    seconds = openai_client._retry_after
    assert seconds("7") == 7
    assert seconds("-1") == seconds("soon") == seconds("nan") == 0
    assert seconds("1e9") == seconds("Fri, 31 Dec 2999 23:59:59 GMT") == 600


@pytest.mark.parametrize(
    ("server", "more", "code", "says"),
    [
        ({"models": ("a", "b")}, (), 2, "serves a, b: choose one with --served-model"),
        ({"models": ("a", "b")}, ("--served-model", "c"), 2, "--served-model c: "),
        ({"models": ()}, (), 2, "lists no models: name one with --served-model"),
        ({"key": "s3cret"}, (), 2, "put the server's key in the environment as OPENAI_API_KEY"),
        ({"always": 418}, (), 2, "status 418 (busy)"),
        ({"kind": "openai"}, ("--top-k", 5), 2, "Unrecognized request argument: "),
        (
            {"kind": "llamacpp"},
            ("--eos-token-id", 3),
            2,
            "only vLLM's server can be told which tokens end",
        ),
        ({"kind": "sglang"}, ("--no-eos",), 2, "only vLLM's server can be told which tokens end"),
        ({"kind": "sglang"}, ("--top-k", 5, "--top-p", 0.9), 2, "--top-k with --top-p: SGLang applies"),
        ({"window": 8}, (), 1, "its context window is smaller; lower --max-new-tokens"),
        ({"ends": (0, 3), "kind": "sglang"}, (), 1, "the rollout ended with '3', and"),
        ({"ends": (3,), "kind": "vllm"}, (), 1, "the rollout goes on after token 0"),
        ({}, ("--batch-size", 4), 2, "--engine openai decides the width itself"),
        ({}, ("--device", "cpu"), 2, "--device: not an option of --engine openai"),
        ({}, ("--concurrency", 0), 2, "--concurrency 0: needs at least 1"),
        ({}, ("--base-url", "localhost:8000"), 2, "--base-url: needs an address like"),
        ({}, ("--base-url", "http://me:s3cret@host/v1"), 2, "with no password in it"),
    ],
)
def test_a_refusal_is_one_line(tmp_path, chain, canopy, prompts, server, more, code, says):
    with serving(**server) as running:
        found, _, err = canopy(*arguments(tmp_path / "s", chain, running.url, prompts, *more))
    assert found == code, err
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert "s3cret" not in err


def first_id(value):
    return lambda choice: choice["token_ids"].__setitem__(0, value)


def first_logged(**values):
    return lambda choice: choice["logprobs"]["content"][0].update(values)


@pytest.mark.parametrize(
    ("kind", "spoil", "says"),
    [
        ("vllm", first_id(-1), "token 1 has id -1, and token ids go from 0 to 7"),
        ("vllm", first_id(8), "token 1 has id 8, and token ids go from 0 to 7"),
        ("vllm", first_id(10**300), "token 1 has id 10000000000"),
        ("vllm", first_id(True), "token 1 has an id that is no whole number"),
        ("vllm", first_id(1.0), "token 1 has an id that is no whole number"),
        ("vllm", first_id(None), "token 1 has an id that is no whole number"),
        ("vllm", first_id("s3cret-key"), "token 1 has an id that is no whole number"),
        ("llamacpp", first_logged(id=-3), "token 1 has id -3, and token ids go from 0 to 7"),
        ("llamacpp", first_logged(id=2**40), "token 1 has id 1099511627776, and"),
        ("llamacpp", first_logged(id=True), "token 1: id needs a whole number"),
        ("llamacpp", first_logged(logprob=float("nan")), "token 1: logprob nan is no log-prob"),
        ("llamacpp", first_logged(logprob=10**400), "token 1: logprob inf is no log-prob"),
        (
            "llamacpp",
            lambda choice: choice["logprobs"]["content"][0]["top_logprobs"][0].update(id=8),
            "top_logprobs: token 1 has id 8, and token ids go from 0 to 7",
        ),
        (
            "vllm-old",
            lambda choice: choice["logprobs"]["tokens"].__setitem__(0, "token_id:8"),
            "token 1 has id 8, and token ids go from 0 to 7",
        ),
        (
            "vllm",
            lambda choice: choice.update(token_ids=[*choice["token_ids"][:-1], 5], stop_reason=False),
            "the rollout ended with 'False', and the end tokens of --model are [0]",
        ),
        (
            "vllm",
            lambda choice: choice.update(finish_reason="s3cret-key\x1b[2J" + "x" * 999),
            "finish_reason needs stop or length, and is '…xxx",
        ),
    ],
)
def test_tokens_that_are_none_are_refused(
    tmp_path, chain, canopy, prompts, monkeypatch, kind, spoil, says
):
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret-key")

    def spoil_stopped(choice):
        if choice["finish_reason"] == "stop":
            spoil(choice)

    with serving(kind=kind, spoil=spoil_stopped) as running:
        line = arguments(tmp_path / "s", chain, running.url, prompts, "--top-logprobs", 2)
        code, _, err = canopy(*line)
    assert code == 1, err
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert len(err) < 400
    assert "s3cret" not in err


def test_no_server_and_no_address(tmp_path, chain, canopy, prompts):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    code, _, err = canopy(*arguments(tmp_path / "s", chain, url, prompts))
    assert code == 1
    assert f"canopy: {url}: no answer (" in err
    assert "is the server up?" in err
    line = arguments(tmp_path / "s", chain, url, prompts)
    at = line.index("--base-url")
    code, _, err = canopy(*line[:at], *line[at + 2 :])
    assert code == 2
    assert "--engine openai needs --base-url" in err


def test_of_several_end_tokens_the_server_must_say_which(tmp_path, chain, canopy, prompts):
    two = tmp_path / "two"
    shutil.copytree(chain, two)
    path = two / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [0, 3]}))
    for kind in ("vllm", "sglang", "llamacpp"):
        with serving(kind=kind, ends=(0, 3)) as server:
            assert canopy(*arguments(tmp_path / kind, two, server.url, prompts))[0] == 0
        stored = rollouts(tmp_path / kind)
        last = stored["token_ids"].list.last()
        assert (last.is_in([0, 3]) == (stored["finish_reason"] == "stop")).all()
        assert {0, 3} <= set(last)
    with serving(kind="openai", ends=(0, 3)) as server:
        code, _, err = canopy(*arguments(tmp_path / "openai", two, server.url, prompts))
    assert code == 1
    assert "the answer does not name which of the end tokens [0, 3] ended the rollout" in err


def test_other_end_tokens_are_asked_of_vllm(tmp_path, chain, canopy, prompts):
    with serving() as server:
        line = arguments(tmp_path / "s", chain, server.url, prompts, "--eos-token-id", 3)
        assert canopy(*line)[0] == 0
        assert server.asked[0]["ignore_eos"] is True
        assert server.asked[0]["stop_token_ids"] == [3]
    stored = rollouts(tmp_path / "s")
    assert set(stored.filter(finish_reason="stop")["token_ids"].list.last()) == {3}
    assert 0 in stored["token_ids"].explode().to_list()


def test_the_key_goes_to_the_server_and_nowhere_else(tmp_path, chain, canopy, prompts, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret-key")
    root = tmp_path / "s"
    with serving(key="s3cret-key") as server:
        code, out, err = canopy(*arguments(root, chain, server.url, prompts))
        assert code == 0, err
    stored = b"".join(path.read_bytes() for path in root.rglob("*") if path.is_file())
    assert b"s3cret" not in stored
    with serving(key="another") as server:  # it repeats the key it was sent
        code, out, err = canopy(*arguments(tmp_path / "t", chain, server.url, prompts))
    assert code == 2
    assert "bad key: Bearer …" in err
    assert "s3cret" not in out + err


# ---------------------------------------------------------------- kill -9


# Imports the heavy packages once and forks a client at each word, as in test_crash.
DRIVER = """
import json, os, sys
from canopy_store.cli import main
from canopy_store.ingest import openai_client, rollouts  # noqa
openai_client._FIRST_WAIT = 0.2
for word in sys.stdin:
    if word.strip() == "start":
        pid = os.fork()
        if pid == 0:
            sys.stdout = sys.stderr = open(os.devnull, "w")
            os._exit(main(json.loads(sys.argv[1])))
        print(pid, flush=True)
    else:
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def test_client_and_server_killed_again_and_again(tmp_path, chain, prompts):
    """Whatever dies, run the same command again: the run is that of an unbroken one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    many = write_prompts(tmp_path / "many.jsonl", *(f"{a} {b}" for a in "ab" for b in "abcdefg"))
    env = {**os.environ, "PYTHONPATH": os.fspath(Path(__file__).parent)}

    def start_server() -> subprocess.Popen:
        script, behaviour = Path(__file__).parent / "openai_server.py", json.dumps({"pause": 0.03})
        started = subprocess.Popen([sys.executable, script, str(port), behaviour], env=env)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return started
            time.sleep(0.02)
        raise TimeoutError("the server did not start")

    def shards() -> int:
        return len(list((tmp_path / "s" / "rollouts").rglob("part-*.parquet")))

    line = [str(a) for a in arguments(tmp_path / "s", chain, url, many, "--concurrency", 2)]
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, json.dumps(line)],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )

    def say(word: str) -> int:
        print(word, file=driver.stdin, flush=True)
        return int(driver.stdout.readline())

    def wait_for(count: int) -> None:
        deadline = time.monotonic() + 60
        while shards() < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    draw, server, killed = random.Random(3), start_server(), []
    try:
        for victim in ("client", "server"):
            client, before = say("start"), shards()
            wait_for(before + 1)
            time.sleep(draw.uniform(0, 0.1))
            if victim == "server":
                server.send_signal(signal.SIGKILL)
                server.wait()
                found = shards()
                server = start_server()
                wait_for(found + 1)  # the client waited, and went on by itself
            os.kill(client, signal.SIGKILL)
            assert say("wait") == -signal.SIGKILL
            killed.append(shards())
        assert killed == sorted(set(killed))  # each went on where the last one stopped
        assert killed[-1] < 14
        say("start")
        assert say("wait") == 0
    finally:
        for process in (server, driver):
            process.kill()
            process.communicate()
    from canopy_store.cli import main

    with serving() as whole:
        assert main([str(a) for a in arguments(tmp_path / "whole", chain, whole.url, many)]) == 0
    assert rollouts(tmp_path / "s").equals(rollouts(tmp_path / "whole"))
    assert len(rollouts(tmp_path / "s")) == 14 * 6


def test_vllm_not_installed(tmp_path, chain, canopy, prompts):
    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed here")
    line = arguments(tmp_path / "s", chain, "", prompts)
    at = line.index("--engine")
    code, _, err = canopy(*line[:at], "--engine", "vllm", *line[at + 4 :])
    assert code == 2
    assert "pip install 'canopy-store[ingest,vllm]'" in err
    assert len(err.strip().splitlines()) == 1
