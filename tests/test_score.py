"""Scores against what is known: the sampler's own log, chains in closed form, transformers' own pass."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from chain import CHAIN_LOGITS, chain_policy, save_chain
from stores import write_prompts
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import canopy_store
from canopy_store.ingest.draw import Sampling
from canopy_store.ingest.progress import Progress
from canopy_store.ingest.rollouts import ingest_rollouts
from canopy_store.ingest.score import ingest_scores
from canopy_store.ingest.teacher_forcing import score_tokens

OTHER_LOGITS = CHAIN_LOGITS + np.random.default_rng(3).normal(0, 0.4, CHAIN_LOGITS.shape)
KEYS = ["run_id", "prompt_id", "sample"]
RECORD = ("logprob", "entropy", "eos_logprob")
PROMPTS = [f"{s} a" for s in "abcdefg"] + ["b c a"]  # all end in state a


@pytest.fixture(scope="session")
def other(tmp_path_factory) -> Path:
    """Another chain of the same states."""
    return save_chain(tmp_path_factory.mktemp("other"), OTHER_LOGITS)


@pytest.fixture(scope="session")
def attentive(tmp_path_factory, chain) -> Path:
    """A Llama that attends to all it has read, with random weights large enough to matter."""
    folder = tmp_path_factory.mktemp("attentive")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        eos_token_id=0,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.4,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in chain.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def sample(root: Path, model: Path, prompts: Path, variant: str = "base", **settings) -> str:
    settings = {"samples": 6, "max_new_tokens": 20, "prompts_per_shard": 1, **settings}
    return ingest_rollouts(
        root,
        str(model),
        family="f",
        variant=variant,
        task="t",
        prompts=prompts,
        device="cpu",
        **settings,
    )


def score(root: Path, model: Path, **settings) -> str:
    return ingest_scores(root, str(model), **{"device": "cpu", **settings})


def scored_beside_logged(root: Path) -> pl.DataFrame:
    scores = canopy_store.read(root, "scores").rename({name: f"scored_{name}" for name in RECORD})
    return canopy_store.read(root, "rollouts").join(scores, on=KEYS, suffix="_scored")


class Said(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


# ---------------------------------------------------------------- agreement


@pytest.mark.parametrize("which", ["chain", "attentive"])
@pytest.mark.parametrize(
    "policy",
    [{}, {"temperature": 1.5, "top_k": 4}, {"temperature": 0.8, "top_p": 0.7}, {"temperature": 0}],
)
def test_a_run_scored_by_its_own_model_is_its_log(tmp_path, request, which, policy):
    model = request.getfixturevalue(which)
    prompts = write_prompts(tmp_path / "p.jsonl", "a b", "g", "c d e a b")
    sample(tmp_path / "s", model, prompts, **policy)
    said = Said()
    assert score(tmp_path / "s", model, batch_size=4, chunk_tokens=7, progress=said) == "f/base"
    frame = scored_beside_logged(tmp_path / "s")
    assert len(frame) == 18
    for row in frame.iter_rows(named=True):
        for name in RECORD:
            assert row[f"scored_{name}"] == pytest.approx(row[name], abs=1e-5), name
        for name in ("entropy_sum", "surprisal_sum", "stop_entropy_sum"):
            assert row[f"{name}_scored"] == pytest.approx(row[name], abs=1e-4), name
    (line,) = said.lines
    assert "sampled in float32, scored by its own model in float32: largest difference" in line
    largest = max(
        np.abs(np.subtract(row["scored_logprob"], row["logprob"])).max() for row in frame.to_dicts()
    )
    assert f"{largest:.2g} nats in logprob" in line
    (pooled,) = canopy_store.read(tmp_path / "s", "kl_divergence").to_dicts()
    assert (pooled["same_policy"], pooled["n_outside"], pooled["n_rollouts"]) == (True, 0, 18)
    assert pooled["kl"] == pytest.approx(0, abs=1e-4)


def test_another_chain_gives_its_known_probabilities(tmp_path, chain, other):
    prompts = write_prompts(tmp_path / "p.jsonl", "a b", "g", "c d e a")
    sample(tmp_path / "s", chain, prompts, top_k=6)
    score(tmp_path / "s", other, name="full", policy="full")
    score(tmp_path / "s", other, name="cut", temperature=1.3, top_k=5)
    starts = {
        row["prompt_id"]: "_abcdefg".index(row["text"][-1])
        for row in canopy_store.read(tmp_path / "s", "prompts").to_dicts()
    }
    rows = scored_beside_logged(tmp_path / "s").to_dicts()
    assert len(rows) == 36
    assert {row["policy"] for row in rows} == {
        '{"temperature":1.0,"top_k":0,"top_p":1.0}',
        '{"temperature":1.3,"top_k":5,"top_p":1.0}',
    }
    outside = 0
    for row in rows:
        full = row["scorer_id"] == "full"
        matrix = policy_of(OTHER_LOGITS, 1.0, 0) if full else policy_of(OTHER_LOGITS, 1.3, 5)
        path = [starts[row["prompt_id"]], *row["token_ids"]]
        with np.errstate(divide="ignore"):
            expected = [np.log(matrix[a, b]) for a, b in itertools.pairwise(path)]
            ends = [np.log(matrix[a, 0]) for a in path[:-1]]
        assert row["scored_logprob"] == pytest.approx(expected, abs=1e-5)
        assert row["scored_eos_logprob"] == pytest.approx(ends, abs=1e-5)
        assert row["scored_entropy"] == pytest.approx([entropy(matrix[a]) for a in path[:-1]], abs=1e-5)
        assert row["surprisal_sum_scored"] == pytest.approx(-np.sum(expected), abs=1e-4)
        outside += np.isinf(expected).any()
    # a token the scorer cannot give: counted, and left out of every mean
    assert 0 < outside < 18
    frame = canopy_store.read(tmp_path / "s", "kl_divergence")
    cut, whole = (frame.row(by_predicate=pl.col("scorer_id") == n, named=True) for n in ("cut", "full"))
    assert (cut["n_outside"], whole["n_outside"]) == (outside, 0)
    finite = [r for r in rows if r["scorer_id"] == "cut" and np.isfinite(r["surprisal_sum_scored"])]
    by_prompt = [
        np.mean([r["surprisal_sum_scored"] for r in finite if r["prompt_id"] == prompt])
        for prompt in {r["prompt_id"] for r in finite}
    ]
    assert cut["cross_entropy"] == pytest.approx(np.mean(by_prompt), abs=1e-9)
    assert not cut["same_policy"]
    assert not whole["same_policy"]
    steps = canopy_store.read(tmp_path / "s", "kl_trajectory").filter(scorer_id="cut")
    lost = sum(np.isinf(r["scored_logprob"]).sum() for r in rows if r["scorer_id"] == "cut")
    assert steps["n_outside"].sum() == lost
    for view in ("cross_entropy", "kl_divergence", "kl_trajectory"):
        for column in canopy_store.read(tmp_path / "s", view).select(pl.col(pl.Float64)):
            assert column.drop_nulls().is_finite().all(), (view, column.name)


def policy_of(logits: np.ndarray, temperature: float, top_k: int) -> np.ndarray:
    """`chain_policy` of other logits."""
    edge = np.sort(logits, axis=1)[:, -top_k][:, None] if top_k else -np.inf
    weight = np.where(logits >= edge, np.exp(logits / temperature), 0)
    return weight / weight.sum(axis=1, keepdims=True)


def entropy(p: np.ndarray) -> float:
    return -float(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum())


def sequence_kl(p: np.ndarray, q: np.ndarray, start: int) -> float:
    """KL of the walks of two chains: the visits to each state times the divergence there."""
    visits = np.linalg.inv(np.eye(len(p) - 1) - p[1:, 1:])[start - 1]
    return float(visits @ (p * np.log(p / q)).sum(axis=1)[1:])


@pytest.mark.parametrize("temperature", [1.0, 1.4])
def test_divergences_match_the_closed_form(tmp_path, chain, other, temperature):
    """Both directions, 4,000 rollouts each, pooled, per prompt and at the first positions."""
    prompts = write_prompts(tmp_path / "p.jsonl", *PROMPTS)
    settings = {
        "samples": 500,
        "batch_size": 500,
        "max_new_tokens": 480,
        "prompts_per_shard": 4,
        "temperature": temperature,
    }
    sample(tmp_path / "s", chain, prompts, "base", **settings)
    sample(tmp_path / "s", other, prompts, "sft", **settings)
    for model in (chain, other):
        score(tmp_path / "s", model, batch_size=500, chunk_tokens=100_000)
    base, sft = chain_policy(temperature, 0), policy_of(OTHER_LOGITS, temperature, 0)
    assert base == pytest.approx(policy_of(CHAIN_LOGITS, temperature, 0))
    pooled, per_prompt, steps = (
        canopy_store.read(tmp_path / "s", v) for v in ("kl_divergence", "cross_entropy", "kl_trajectory")
    )
    assert len(pooled) == 4
    for variant, scorer, p, q in (("base", "f/sft", base, sft), ("sft", "f/base", sft, base)):
        truth = sequence_kl(p, q, start=1)
        row = pooled.row(
            by_predicate=(pl.col("variant") == variant) & (pl.col("scorer_id") == scorer), named=True
        )
        assert (row["n_rollouts"], row["n_prompts"], row["same_policy"]) == (4000, 8, True)
        assert abs(row["kl"] - truth) < 4 * row["kl_se"]
        assert row["kl_se"] < 0.1 * truth
        # all prompts have one truth, so both standard errors estimate the same
        assert row["kl_se_prompts"] == pytest.approx(row["kl_se"], rel=0.8)
        visits = np.linalg.inv(np.eye(7) - p[1:, 1:])[0]
        cross = visits @ -(p * np.log(q)).sum(axis=1)[1:]
        assert abs(row["cross_entropy"] - cross) < 4 * row["cross_entropy_se"]
        mine = per_prompt.filter(variant=variant, scorer_id=scorer)
        assert mine["n_rollouts"].to_list() == [500] * 8
        z = ((mine["kl"] - truth) / mine["kl_se"]).to_numpy()
        assert np.abs(z).max() < 4.5
        along = steps.filter(variant=variant, scorer_id=scorer).sort("position")
        # the chain rule: divergences of the steps, weighted by who gets there, add up
        total = (along["active"] * along["kl"]).sum() / 4000
        assert total == pytest.approx(row["kl"], abs=1e-5)
        reach = np.eye(7)[0]
        for step in along.head(6).to_dicts():
            here = (reach / reach.sum()) @ (p * np.log(p / q)).sum(axis=1)[1:]
            assert abs(step["kl"] - here) < 4.5 * step["kl_se"], step["position"]
            reach = reach @ p[1:, 1:]
    own = pooled.filter(pl.col("scorer_id") == pl.lit("f/") + pl.col("variant"))
    assert own["kl"].abs().max() < 1e-5


# ---------------------------------------------------------------- the pass


PROMPT_IDS = [[1, 2, 3], [4], [5, 6], [1, 2, 3, 4, 5, 6, 7], [7, 7]]
ROLLOUT_IDS = [[1, 2, 0], [3, 3, 4, 5, 6, 1, 2, 3, 0], [4], [5, 5, 0], [6, 1, 2, 3]]


def alone(model, sampling: Sampling) -> list[np.ndarray]:
    """Each rollout in a call of its own, all its logits at once."""
    from canopy_store.ingest.policy import sampling_policy

    expected = []
    for prompt, rollout in zip(PROMPT_IDS, ROLLOUT_IDS, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + rollout])).logits[0, len(prompt) - 1 : -1]
        policy = sampling_policy(logits, sampling.temperature, sampling.top_k, sampling.top_p)
        picked = [
            policy.event_logprob(torch.arange(logits.shape[1]) == t)[i].item()
            for i, t in enumerate(rollout)
        ]
        ends = policy.event_logprob(torch.arange(logits.shape[1]) == 0)
        rows = [picked, policy.entropy().tolist(), ends.tolist()]
        if sampling.cuts:
            whole = (logits.double() / sampling.temperature).log_softmax(-1)
            kept = [
                [policy.event_logprob(torch.arange(8) == t)[i] > -np.inf for t in range(8)]
                for i in range(len(rollout))
            ]
            kept = torch.tensor(kept)
            rows += [whole.masked_fill(~kept, -np.inf).logsumexp(-1).tolist(), kept.sum(-1).tolist()]
        expected.append(np.array(rows))
    return expected


def random_model(kind: str):
    torch.manual_seed(1)
    if kind == "gemma2":
        # its forward caps the logits after the head, and hard
        return Gemma2ForCausalLM(
            Gemma2Config(
                vocab_size=8,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                head_dim=8,
                num_attention_heads=2,
                num_key_value_heads=1,
                final_logit_softcapping=1.5,
                initializer_range=0.5,
                sliding_window=4,
            )
        ).eval()
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=8, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5)
    ).eval()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("policy", [Sampling(end_ids=(0,)), Sampling(0.7, 6, 0.9, end_ids=(0,))])
def test_neither_batches_nor_chunks_change_anything(attentive, kind, policy):
    model = (
        AutoModelForCausalLM.from_pretrained(attentive, dtype=torch.float32)
        if kind == "llama"
        else random_model(kind)
    )
    expected = alone(model, policy)
    for width, chunk in ((1, 512), (2, 3), (5, 1), (5, 512), (64, 4)):
        sampling = Sampling(policy.temperature, policy.top_k, policy.top_p, 0, (0,), 0, width)
        found = score_tokens(model, PROMPT_IDS, ROLLOUT_IDS, sampling, chunk)
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.dtype == np.float32
            assert mine == pytest.approx(theirs, abs=1e-5), (width, chunk)


def test_no_more_logits_than_a_chunk_are_ever_held(attentive):
    model = AutoModelForCausalLM.from_pretrained(attentive, dtype=torch.float32)
    held, bodies = [], []
    model.lm_head.register_forward_hook(lambda _m, _a, out: held.append(out.shape[0] * out.shape[1]))
    model.model.layers[0].register_forward_hook(lambda *_: bodies.append(1))
    score_tokens(model, PROMPT_IDS, ROLLOUT_IDS, Sampling(width=5), 6)
    assert max(held) == 6  # 20 steps in all
    assert len(bodies) == 1
    assert "forward" not in vars(model.model)


# ---------------------------------------------------------------- breaks


def test_it_resumes_after_kill_9_and_gives_the_same_bytes(tmp_path, attentive):
    prompts = write_prompts(tmp_path / "p.jsonl", *[f"a {w} {v}" for w in "ab" for v in "abcdefg"])
    sample(tmp_path / "s", attentive, prompts, samples=3)
    shutil.copytree(tmp_path / "s", tmp_path / "whole")
    score(tmp_path / "whole", attentive)
    call = f"ingest_scores({str(tmp_path / 's')!r}, {str(attentive)!r}, device='cpu')"
    job = subprocess.Popen(
        [sys.executable, "-c", f"from canopy_store.ingest.score import ingest_scores\n{call}"],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "s" / "scores").rglob("part-*.parquet")):
        assert job.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    job.send_signal(signal.SIGKILL)
    job.wait()
    files = sorted(
        f.relative_to(tmp_path / "whole") for f in (tmp_path / "whole" / "scores").rglob("*.p*")
    )
    assert len(files) == 14
    done = [f for f in files if (tmp_path / "s" / f).exists()]
    assert len(done) < 14
    for file in done:  # what was written is whole
        assert (tmp_path / "s" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    before = {file: (tmp_path / "s" / file).stat().st_mtime_ns for file in done}
    score(tmp_path / "s", attentive)
    for file in files:
        assert (tmp_path / "s" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert before == {file: (tmp_path / "s" / file).stat().st_mtime_ns for file in done}
    left = [f for f in (tmp_path / "s" / "scores").rglob("*") if f.name.endswith(".tmp")]
    assert left == []


def test_runs_added_later_are_taken_up_and_policies_stand_side_by_side(tmp_path, chain, other):
    prompts = write_prompts(tmp_path / "p.jsonl", "a b", "g")
    sample(tmp_path / "s", chain, prompts)
    score(tmp_path / "s", other, name="o", policy="full")
    sample(tmp_path / "s", chain, prompts, run="later", top_k=5)
    score(tmp_path / "s", other, name="o", policy="full")
    assert canopy_store.read(tmp_path / "s", "kl_divergence").sort("run_id").select(
        "run_id", "same_policy"
    ).rows() == [("f.base.t", True), ("later", False)]
    score(tmp_path / "s", other, name="o")
    frame = canopy_store.read(tmp_path / "s", "kl_divergence").sort("run_id", "same_policy")
    assert frame.select("run_id", "same_policy").rows() == [
        ("f.base.t", True),
        ("later", False),
        ("later", True),
    ]
    full, cut = frame.filter(run_id="later").to_dicts()
    assert json.loads(cut["policy"])["top_k"] == 5
    assert full["n_outside"] == 0
    # the run's own model, under the full policy: p is still what was sampled, and log p >= log q
    score(tmp_path / "s", chain, runs=("later",), policy="full")
    own = canopy_store.read(tmp_path / "s", "kl_divergence").filter(scorer_id="f/base")
    assert own["kl"][0] > 0.05


# ---------------------------------------------------------------- engines that gave less


def test_an_imported_run_is_completed_by_its_own_model(tmp_path, chain, other):
    """An engine that logged no logprob: log p comes from the model's own scores."""
    prompts = tmp_path / "p.jsonl"
    lines = [{"text": "a b", "prompt_id": "one"}, {"text": "g", "prompt_id": "two"}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sample(tmp_path / "s", chain, prompts, samples=40)
    full = tmp_path / "full"
    shutil.copytree(tmp_path / "s", full)
    score(full, other, name="o")
    rows = canopy_store.read(tmp_path / "s", "rollouts").select(
        "family", "variant", "task", "prompt_id", "sample", "text", "token_ids", "entropy"
    )
    rows.write_parquet(tmp_path / "in.parquet")
    root = tmp_path / "imported"
    canopy_store.import_rollouts(root, tmp_path / "in.parquet")
    policy = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    for missing, settings in (
        ("temperature, top_k, top_p is not recorded; pass --policy full", {}),
        ("is not recorded; pass --template chat or plain", policy),
        ("has no text of it to score after; name the file", {**policy, "template": "plain"}),
    ):
        with pytest.raises(canopy_store.DataError, match=missing):
            score(root, chain, **settings)
    told = {"policy": "full", "template": "plain", "prompts": prompts}
    score(root, chain, name="f/base", **told)
    score(root, other, name="o", **told)
    found = canopy_store.read(root, "scores").filter(scorer_id="f/base").sort(KEYS)
    logged = canopy_store.read(full, "rollouts").sort(KEYS)
    for mine, theirs in zip(found["logprob"], logged["logprob"], strict=True):
        assert mine.to_list() == pytest.approx(theirs.to_list(), abs=1e-5)
    rows = rows.with_columns(pl.lit("b").alias("text"))
    rows.write_parquet(tmp_path / "foreign.parquet")
    canopy_store.import_rollouts(tmp_path / "foreign", tmp_path / "foreign.parquet")
    with pytest.raises(canopy_store.DataError, match="its token ids spell other text"):
        score(tmp_path / "foreign", chain, **told)


# ---------------------------------------------------------------- refusals


def test_what_is_refused(tmp_path, chain, other, attentive):
    prompts = write_prompts(tmp_path / "p.jsonl", "a b", "g")
    root = tmp_path / "s"
    sample(root, chain, prompts)
    # another tokenizer
    foreign = tmp_path / "foreign"
    shutil.copytree(chain, foreign)
    vocabulary = json.loads((foreign / "tokenizer.json").read_text())
    words = vocabulary["model"]["vocab"]
    words["b"], words["c"] = words["c"], words["b"]
    (foreign / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(canopy_store.DataError, match="sampled with another tokenizer"):
        score(root, foreign)
    # another scorer under the same name, and other settings
    score(root, other, name="x")
    before = {f: f.read_bytes() for f in (root / "scores").rglob("*.parquet")}
    with pytest.raises(canopy_store.ConflictError, match=r"weights_sha256 .stored"):
        score(root, chain, name="x")
    with pytest.raises(canopy_store.ConflictError, match=r"dtype .stored 'float32', asked 'bfloat16'"):
        score(root, other, name="x", dtype="bfloat16")
    # a chat template the run did not have
    chatty = tmp_path / "chatty"
    shutil.copytree(chain, chatty)
    (chatty / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}{% endfor %} c"
    )
    sample(tmp_path / "chat", chatty, prompts)
    with pytest.raises(canopy_store.DataError, match="went through a chat template"):
        score(tmp_path / "chat", chain)
    (chatty / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}{% endfor %} d"
    )
    with pytest.raises(canopy_store.DataError, match="makes other tokens of the prompts"):
        score(tmp_path / "chat", chatty)
    # a context window too short
    short = save_chain(tmp_path / "short", max_position_embeddings=3)
    with pytest.raises(canopy_store.DataError, match="exceed the scorer's context window of 3"):
        score(root, short)
    # wrong calls
    for settings, text in (
        ({"policy": "half"}, "one of run, full"),
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"temperature": -1.0}, "--temperature"),
        ({"top_k": -1}, "--top-k"),
        ({"chunk_tokens": 0}, "--chunk-tokens 0"),
        ({"template": "x"}, "one of run, chat, plain"),
    ):
        with pytest.raises(canopy_store.UsageError, match=text):
            score(root, chain, **settings)
    with pytest.raises(canopy_store.StoreError, match="no complete run"):
        score(root, chain, runs=("nobody",))
    assert before == {f: f.read_bytes() for f in (root / "scores").rglob("*.parquet")}


def test_a_run_without_token_ids_is_refused(tmp_path, chain):
    row = {
        "family": "f",
        "variant": "base",
        "task": "t",
        "prompt_id": "p",
        "sample": 0,
        "entropy": [1.0],
    }
    pl.DataFrame([row]).write_parquet(tmp_path / "in.parquet")
    canopy_store.import_rollouts(tmp_path / "s", tmp_path / "in.parquet")
    with pytest.raises(canopy_store.DataError, match=r"run f\.base\.t: no token ids are stored"):
        score(tmp_path / "s", chain)


def test_damaged_weights_are_named_by_prompt_sample_and_step(tmp_path, chain):
    prompts = write_prompts(tmp_path / "p.jsonl", "a b")
    sample(tmp_path / "s", chain, prompts, samples=30)
    broken = tmp_path / "broken"
    shutil.copytree(chain, broken)
    model = AutoModelForCausalLM.from_pretrained(chain, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[3, 5] = 2e38  # overflows to inf after state e alone
    model.save_pretrained(broken)
    with pytest.raises(canopy_store.DataError, match="NaN or infinite") as error:
        score(tmp_path / "s", broken, batch_size=1)
    rows = {
        r["sample"]: r["token_ids"] for r in canopy_store.read(tmp_path / "s", "rollouts").to_dicts()
    }
    text = str(error.value)
    number, step = (
        int(text.split(f"{word} ")[1].split(",")[0].split(":")[0]) for word in ("sample", "step")
    )
    assert "prompt " in text
    assert rows[number].index(5) == step - 2  # the step after the first e
    assert not list((tmp_path / "s" / "scores").rglob("*.parquet"))


def test_the_command(tmp_path, chain, canopy):
    prompts = write_prompts(tmp_path / "p.jsonl", "a b")
    sample(tmp_path / "s", chain, prompts, samples=5)
    code, out, err = canopy(
        "ingest", "score", "--store", tmp_path / "s", "--scorer", chain, "--device", "cpu"
    )
    assert code == 0, err
    assert "scores as" in out
    code, out, _ = canopy(
        "sql", "select count(*) as n from scores", "--store", tmp_path / "s", "--format", "csv"
    )
    assert out.split() == ["n", "5"]
