"""Both ways to vLLM, for real: `make test-vllm`. Pytest collects no file of this name by itself.

The model is SmolLM2 of `make demo-real`. Sampling here, vLLM inside; rescoring in the main environment,
whose Python CANOPY_PYTHON names. A run completed by its own model is compared with one of --engine
transformers; texts are not, since engines round differently.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

import canopy_store

MODEL = Path(__file__).parents[1] / "demo-real-output" / "base"
MAIN = os.environ.get("CANOPY_PYTHON", sys.executable)
TEXTS = [
    "Name a colour and say why you like it.",
    "Write one sentence about the sea.",
    "What is two plus two?",
    "Invent a name for a cat.",
]
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
SAMPLES, STEPS = 16, 32


def command(python: str, root: Path, *more: object) -> list[str]:
    return [python, "-m", "canopy_store.cli", *map(str, more), "--store", str(root)]


def run(python: str, root: Path, *more: object) -> str:
    done = subprocess.run(command(python, root, *more), env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def sampling(prompts: Path, engine: str, *more: object) -> list[object]:
    return [
        "ingest",
        "rollouts",
        "--model",
        MODEL,
        "--family",
        "smollm2",
        "--variant",
        "base",
        "--task",
        "chat",
        "--prompts",
        prompts,
        "--samples",
        SAMPLES,
        "--max-new-tokens",
        STEPS,
        "--engine",
        engine,
        "--run",
        engine,
        *more,
    ]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory, prompts) -> Path:
    """The same sampling by transformers, with the whole record."""
    root = tmp_path_factory.mktemp("own") / "s"
    run(MAIN, root, *sampling(prompts, "transformers", "--device", "cpu"))
    return root


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of vLLM's server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    with open(log, "w") as out:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "vllm.entrypoints.openai.api_server",
                "--model",
                MODEL,
                "--served-model-name",
                "smol",
                "--dtype",
                "float32",
                "--enforce-eager",
                "--max-model-len",
                "2048",
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
            ],
            env=ENV,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 1200
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def check(root: Path, name: str, own: Path, logged: bool = True) -> None:
    """A run of tokens, rescored: the log it has agrees, and so do the statistics with our own run's."""
    before = canopy_store.read(root, "rollouts")
    assert len(before) == len(TEXTS) * SAMPLES
    assert before["token_ids"].null_count() == 0
    assert before["entropy"].null_count() == len(before)
    assert before["logprob"].null_count() == (0 if logged else len(before))
    ended = before["token_ids"].list.last() == 2  # <|im_end|>
    assert (ended == (before["finish_reason"] == "stop")).all()
    assert (ended | (before["n_tokens"] == STEPS)).all()
    said = run(MAIN, root, "ingest", "score", "--scorer", MODEL, "--run", name, "--device", "cpu")
    print(said.strip())
    if logged:
        scored = canopy_store.read(root, "scores").sort("prompt_id", "sample")
        a, b = (f.sort("prompt_id", "sample")["logprob"].explode().to_numpy() for f in (before, scored))
        assert np.abs(a - b).max() < 0.01
    test = canopy_store.read(root, "logging_check").row(0, named=True)
    assert test["ok"]
    assert abs(test["z"]) < 4
    ours, theirs = (canopy_store.read(r, "rollout_metrics") for r in (own, root))
    for column in ("entropy_sum", "n_tokens", "entropy_rate", "stop_entropy_sum"):
        # prompts differ more than rollouts of one, so the comparison is within prompts
        gaps, variances = [], []
        for key, mine in ours.group_by("prompt_id"):
            other = theirs.filter(prompt_id=key[0])
            x, y = (f[column].to_numpy().astype(float) for f in (mine, other))
            gaps.append(x.mean() - y.mean())
            variances.append(x.var(ddof=1) / len(x) + y.var(ddof=1) / len(y))
        z = np.mean(gaps) * len(gaps) / np.sqrt(sum(variances))
        print(
            f"{name}: {column}: transformers {ours[column].mean():.4g}, here "
            f"{theirs[column].mean():.4g}, z {z:.2f}"
        )
        assert abs(z) < 4, column


def test_the_offline_engine(tmp_path, prompts, own):
    root = tmp_path / "s"
    run(sys.executable, root, *sampling(prompts, "vllm", "--top-logprobs", 3))
    tops = canopy_store.read(root, "rollouts")["top_logprobs"].explode()
    assert set(tops.list.len()) == {3}
    check(root, "vllm", own)


def test_the_server(tmp_path, prompts, own, server):
    root = tmp_path / "s"
    more = ("--base-url", server, "--top-logprobs", 3)
    run(MAIN, root, *sampling(prompts, "openai", *more))
    assert set(canopy_store.read(root, "rollouts")["top_logprobs"].explode().list.len()) == {3}
    check(root, "openai", own)


def test_the_server_under_a_truncated_policy_and_kill_9(tmp_path, prompts, server):
    root, policy = tmp_path / "s", ("--temperature", 0.8, "--top-k", 50, "--top-p", 0.9)
    line = sampling(prompts, "openai", "--base-url", server, "--prompts-per-shard", 1, *policy)
    for shards in (1, 2):
        process = subprocess.Popen(command(MAIN, root, *line), env=ENV, stderr=subprocess.DEVNULL)
        while len(list((root / "rollouts").rglob("part-*.parquet"))) < shards:
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
        process.wait()
    kept = {p: p.stat().st_mtime_ns for p in (root / "rollouts").rglob("part-*.parquet")}
    assert 2 <= len(kept) < len(TEXTS)
    run(MAIN, root, *line)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    own = tmp_path / "own"
    run(MAIN, own, *sampling(prompts, "transformers", "--device", "cpu", *policy))
    check(root, "openai", own, logged=False)


def test_a_model_of_135m_is_no_judge_and_nothing_is_stored(tmp_path, own, server):
    """It is asked of two identical texts first, and answers neither similar nor different in a word."""
    root = Path(shutil.copytree(own, tmp_path / "s"))
    line = ["ingest", "judge", "--judge", "smol", "--method", "chat", "--base-url", server]
    done = subprocess.run(
        command(MAIN, root, *line, "--subsample", 6), env=ENV, capture_output=True, text=True
    )
    foretold, refused = done.stderr.strip().splitlines()
    assert done.returncode == 1, done.stderr
    assert "60 pairs of 4 prompts, 61 to 121 calls" in foretold
    assert "of two identical texts it answered" in refused
    assert canopy_store.read(root, "judgments").is_empty()
