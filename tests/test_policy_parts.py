"""Min-p, typical sampling and repetition penalty: against transformers' own, and on the Markov chain."""

from __future__ import annotations

import functools
import itertools
import json

import numpy as np
import polars as pl
import pytest
import torch
from chain import CHAIN_LOGITS
from openai_server import serving
from stores import ingest_arguments, refused, write_prompts
from transformers import AutoModelForCausalLM
from transformers.generation import logits_process as theirs

import canopy_store
from canopy_store import sql, store
from canopy_store.cli import main
from canopy_store.ingest import captured, sample
from canopy_store.ingest.draw import Job, Sampling, added, uniforms
from canopy_store.ingest.policy import Ends, take_step
from canopy_store.ingest.score import ingest_scores
from canopy_store.ingest.teacher_forcing import _seen

PARTS = {
    "min_p": {"min_p": 0.3},
    "typical": {"typical_p": 0.7},
    "penalty": {"repetition_penalty": 1.7},
    "all": {
        "temperature": 0.8,
        "top_k": 6,
        "top_p": 0.95,
        "min_p": 0.1,
        "typical_p": 0.8,
        "repetition_penalty": 0.6,
    },
}


def warped(before: list[list[int]], logits: torch.Tensor, of: Sampling) -> tuple[torch.Tensor, ...]:
    """Log-probabilities (B, V) of transformers' own processors in float64, and of the uncut policy."""
    scores, ids = logits.double(), torch.tensor(before)
    if of.repetition_penalty != 1:
        scores = theirs.RepetitionPenaltyLogitsProcessor(of.repetition_penalty)(ids, scores)
    plain = theirs.TemperatureLogitsWarper(of.temperature)(ids, scores)
    scores = plain
    for warper, value, off in (
        (theirs.TopKLogitsWarper, of.top_k, 0),
        (theirs.TopPLogitsWarper, of.top_p, 1),
        (theirs.MinPLogitsWarper, of.min_p, 0),
        (theirs.TypicalLogitsWarper, of.typical_p, 1),
    ):
        if value != off:
            scores = warper(value)(ids, scores)
    return scores.log_softmax(-1), plain.log_softmax(-1)


@pytest.mark.parametrize("size", [9, 3000])
@pytest.mark.parametrize("name", PARTS)
def test_a_policy_is_that_of_transformers_own_processors(name, size):
    torch.manual_seed(size)
    sampling = Sampling(**PARTS[name])
    logits = torch.randn(6, size) * torch.tensor([0.3, 1, 2, 3, 5, 8])[:, None]
    before = [[int(t) for t in torch.randint(size, (4,))] for _ in range(6)]
    want, plain = warped(before, logits, sampling)
    seen = torch.zeros(6, size, dtype=torch.bool).scatter(1, torch.tensor(before), True)
    tokens = want.argmax(-1)
    ends = Ends([1, 2], size, torch.device("cpu"))
    step = take_step(logits, sampling, ends, tokens=tokens, seen=seen)
    record = dict(zip(sampling.record, step.record.double(), strict=True))
    kept = want > -torch.inf
    p = want.exp()
    expected = {
        "logprob": want.gather(1, tokens[:, None])[:, 0],
        "entropy": torch.special.entr(p).sum(-1),
        "eos_logprob": want[:, [1, 2]].logsumexp(-1),
        "log_mass": plain.masked_fill(~kept, -torch.inf).logsumexp(-1),
        "n_kept": kept.sum(-1).double(),
    }
    assert {*record} == {*expected} if sampling.cuts else {*record} < {*expected}
    for key, found in record.items():
        assert found.numpy() == pytest.approx(expected[key].numpy(), abs=3e-5), key


def test_what_stands_before_a_step_is_the_prompt_and_the_rollout_up_to_it():
    prompts, rollouts = [[1, 2], [3], [4, 4]], [[5, 6, 5], [7], [8, 9, 1, 0]]
    every = [
        {*prompt, *rollout[:t]}
        for prompt, rollout in zip(prompts, rollouts, strict=True)
        for t in range(len(rollout))
    ]
    for first, steps in itertools.product(range(8), range(1, 9)):
        found = _seen(prompts, rollouts, first, min(steps, 8 - first), 10)
        assert [set(row.nonzero()[:, 0].tolist()) for row in found] == every[first : first + steps]


@pytest.fixture(scope="module")
def model(chain):
    return AutoModelForCausalLM.from_pretrained(chain, dtype=torch.float32).eval()


def chain_step(before: list[int], of: Sampling) -> tuple[np.ndarray, np.ndarray]:
    logits = torch.tensor(CHAIN_LOGITS[before[-1]])[None]
    return tuple(each[0].numpy() for each in warped([before], logits, of))


@pytest.mark.parametrize("loop", ["shared", "repeated", "captured"])
@pytest.mark.parametrize("name", PARTS)
def test_every_loop_samples_and_logs_the_policy(model, monkeypatch, name, loop):
    """Each step's record is that of its own history; what is drawn has the shares of the policy."""
    own = functools.partial(sample._sample_captured)
    loops = {"shared": sample._sample_shared, "repeated": sample._sample_repeated, "captured": own}
    monkeypatch.setattr(sample, "_loop_for", lambda model: loops[loop])
    monkeypatch.setattr(captured, "FUSE", False)
    sampling = Sampling(**PARTS[name], max_new_tokens=5, end_ids=(0,), width=7)
    jobs = [
        Job(ids, range(20), lambda s, p=p: uniforms("r", 1, str(p), s, 5), f"prompt {p}")
        for p, ids in enumerate([[2, 1], [3, 4, 6]])
    ]
    z = []
    sample.shared_prompt.prepare(model)
    for job, rollouts in zip(jobs, sample.sample_prompts(model, jobs, sampling), strict=True):
        for rollout in rollouts:
            history = list(job.prompt_ids)
            for t, token in enumerate(rollout.token_ids.tolist()):
                policy, plain = chain_step(history, sampling)
                assert rollout.logprob[t] == pytest.approx(policy[token], abs=2e-5)
                entropy = -sum(p * np.log(p) for p in np.exp(policy) if p > 0)
                assert rollout.entropy[t] == pytest.approx(entropy, abs=2e-5)
                if sampling.cuts:
                    assert rollout.logprob[t] + rollout.log_mass[t] == pytest.approx(
                        plain[token], abs=4e-5
                    )
                    assert rollout.n_kept[t] == np.isfinite(policy).sum()
                history.append(token)
                z.append(-rollout.logprob[t] - rollout.entropy[t])
    assert abs(np.mean(z)) < 4.5 * np.std(z) / np.sqrt(len(z)) + 1e-6


@pytest.fixture(scope="module")
def stored(tmp_path_factory, chain):
    """A run under every part, scored by its own model, in the whole distribution too."""
    folder = tmp_path_factory.mktemp("parts")
    prompts = write_prompts(folder / "p.jsonl", "b a", "c d e")
    more = {key.replace("_", "-"): value for key, value in PARTS["all"].items()}
    more |= {"samples": 10, "max-new-tokens": 8}
    arguments = ingest_arguments(folder / "s", chain, prompts, **more)
    assert main(arguments) == 0
    ingest_scores(folder / "s", str(chain))
    ingest_scores(folder / "s", str(chain), policy="full")
    return folder / "s", arguments


def test_a_run_scored_under_its_own_policy_is_what_was_logged(stored):
    root, _ = stored
    frame = canopy_store.read(root, "scored_rollouts").sort("prompt_id", "sample")
    own, full = frame.filter("same_policy"), frame.filter(~pl.col("same_policy"))
    assert len(own) == len(full) == 20
    assert json.loads(own["policy"][0]) == PARTS["all"]
    assert json.loads(full["policy"][0]) == {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    for row in own.to_dicts():
        assert row["scorer_logprob"] == pytest.approx(row["logprob"], abs=1e-5)
        assert row["scorer_entropy"] == pytest.approx(row["entropy"], abs=1e-5)
    run = canopy_store.read(root, "runs").row(0, named=True)
    assert {key: run[key] for key in PARTS["all"]} == PARTS["all"]
    scores = canopy_store.read(root, "scores")
    logged = canopy_store.read(root, "rollouts")["log_mass_sum"].sum()
    assert scores["log_mass_sum"].drop_nulls().sum() == pytest.approx(logged, abs=1e-3)
    assert scores["log_mass"].null_count() == 20
    assert sql.read(root, "logging_check")["ok"].all()


def test_a_run_resumes_with_its_policy_and_with_no_other(stored, canopy):
    _, arguments = stored
    assert main(arguments) == 0
    other = [*arguments, "--min-p", "0.2"]
    refused(canopy(*other), 1, "min_p")


def test_a_policy_without_the_new_parts_has_the_id_that_it_had():
    assert added({"temperature": 1.0, "min_p": 0.0, "typical_p": None}) == {}
    assert added({"min_p": 0.1, "repetition_penalty": 1}) == {"min_p": 0.1}
    assert store.content_id({"temperature": 1.0, "top_k": 0, "top_p": 1.0, **added({})}) == (
        store.content_id({"temperature": 1.0, "top_k": 0, "top_p": 1.0})
    )


def test_runs_that_differ_in_a_new_part_are_not_compared(stored, tmp_path, chain, canopy):
    root, _ = stored
    prompts = write_prompts(tmp_path / "p.jsonl", "b a", "c d e")
    more = {"temperature": 0.8, "top-k": 6, "top-p": 0.95, "typical-p": 0.8, "repetition-penalty": 0.6}
    more |= {"samples": 10, "max-new-tokens": 8, "variant": "sft"}
    assert main(ingest_arguments(root, chain, prompts, **more)) == 0
    refused(canopy("compare", "--store", root), 1, "min_p (0.1 and 0)", "--allow min_p")
    code, _, err = canopy("compare", "--store", root, "--allow", "min_p", "--metric", "mass_cut")
    assert code == 0, err


@pytest.mark.parametrize(
    ("option", "value"),
    [("min-p", 1.5), ("min-p", -0.1), ("typical-p", 0), ("typical-p", 2), ("repetition-penalty", 0)],
)
def test_a_part_that_no_policy_can_have_is_refused(tmp_path, chain, canopy, option, value):
    prompts = write_prompts(tmp_path / "p.jsonl", "b a")
    result = canopy(*ingest_arguments(tmp_path / "s", chain, prompts, **{option: value}))
    refused(result, 2, f"--{option} {float(value)}: needs")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("kind", "parts", "said"),
    [
        ("vllm", {"min-p": 0.2, "repetition-penalty": 1.2}, None),
        ("vllm", {"typical-p": 0.5}, "no typical sampling"),
        ("vllm", {"min-p": 0.2, "top-p": 0.9}, "--min-p with --top-p"),
        ("llamacpp", {"min-p": 0.2}, None),
        ("sglang", {"repetition-penalty": 1.2}, "--repetition-penalty: not known"),
        ("openai", {"min-p": 0.2}, "--min-p: not known"),
    ],
)
def test_a_server_gets_the_parts_that_its_protocol_has(tmp_path, chain, canopy, kind, parts, said):
    prompts = write_prompts(tmp_path / "p.jsonl", "b a")
    with serving(kind=kind) as server:
        more = {"engine": "openai", "base-url": server.url, "samples": 1, **parts}
        arguments = ingest_arguments(tmp_path / "s", chain, prompts, **more)
        at = arguments.index("--batch-size")
        result = canopy(*arguments[:at], *arguments[at + 2 :])
    if said:
        return refused(result, 2, said)
    assert result[0] == 0, result
    (body,) = server.asked
    assert body["min_p"] == 0.2
    assert body["repetition_penalty"] == parts.get("repetition-penalty", 1.0)
    assert body["samplers"][-1] == "min_p"
