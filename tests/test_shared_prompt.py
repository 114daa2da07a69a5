"""Decoding over one copy of the prompt gives what the whole forward pass gives, family by family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from canopy_store.errors import CanopyError
from canopy_store.ingest import captured, sample, shared_prompt
from canopy_store.ingest.draw import Job, Sampling, uniforms
from canopy_store.ingest.sample import sample_prompts

SIZE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
    "head_dim": 8,
}
PROMPTS = ([5, 9, 2, 33, 7], [8], list(range(1, 40)))


def tiny(family: str, **more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZE, **more})
    if getattr(config, "sliding_window", None) and family != "gemma2":
        config.sliding_window = None
    return AutoModelForCausalLM.from_config(config).eval()


def jobs(samples: int, steps: int) -> list[Job]:
    return [
        Job(prompt, range(samples), lambda s, p=p: uniforms("r", 1, str(p), s, steps), f"prompt {p}")
        for p, prompt in enumerate(PROMPTS)
    ]


def flat(rollouts: list) -> list:
    return [rollout for each in rollouts for rollout in each]


def check(model, width: int, sampling: Sampling, samples: int = 7) -> None:
    """Every logged statistic against the model's own pass over prompt and rollout, one at a time."""
    tokens = 0
    model.set_attn_implementation("eager")
    own = [job.prompt_ids for job in jobs(samples, sampling.max_new_tokens)]
    shared_prompt.prepare(model)
    found = sample_prompts(model, jobs(samples, sampling.max_new_tokens), sampling)
    model.set_attn_implementation("eager")
    for prompt, rollouts in zip(own, found, strict=True):
        assert [r.sample for r in rollouts] == list(range(samples))
        for rollout in rollouts:
            whole = torch.tensor([[*prompt, *rollout.token_ids.tolist()]])
            with torch.no_grad():
                logits = model(whole).logits[0, len(prompt) - 1 : -1].float()
            logprobs = (logits / sampling.temperature).log_softmax(-1)
            entropy = torch.special.entr(logprobs.exp()).sum(-1)
            assert rollout.entropy == pytest.approx(entropy.numpy(), abs=1e-4)
            picked = logprobs[torch.arange(len(rollout.token_ids)), rollout.token_ids.astype(int)]
            assert rollout.logprob == pytest.approx(picked.numpy(), abs=1e-4)
            assert rollout.eos_logprob == pytest.approx(logprobs[:, 0].numpy(), abs=1e-4)
            assert (rollout.finish_reason == "stop") == (rollout.token_ids[-1] == 0)
            tokens += len(rollout.token_ids)
    assert tokens > samples * len(PROMPTS)


@pytest.mark.parametrize("family", sorted(shared_prompt._PLAIN))
def test_each_family_that_shares_its_prompt(family):
    model = tiny(family)
    assert shared_prompt.prepare(model), family
    check(model, 8, Sampling(1.3, 0, 1.0, 80, (0,), 0, 8))


@pytest.mark.parametrize("width", [1, 2, 5, 21, 64])
def test_every_width(width):
    check(tiny("llama"), width, Sampling(1.0, 0, 1.0, 30, (0,), 0, width))


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_other_families_go_the_plain_way(family):
    more = {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4} if family == "gpt2" else {}
    model = tiny(family, **more)
    assert not shared_prompt.prepare(model)
    check(model, 8, Sampling(1.0, 0, 1.0, 12, (0,), 0, 8))


def test_widths_agree_but_for_near_ties():
    """The same uniforms: other widths give the same tokens but where rounding tips a near-tie."""
    model = tiny("llama")
    runs = [
        sample_prompts(model, jobs(40, 30), Sampling(1.0, 0, 1.0, 30, (0,), 0, width))
        for width in (7, 64)
    ]
    pairs = [(a, b) for x, y in zip(*runs, strict=True) for a, b in zip(x, y, strict=True)]
    same = np.mean([np.array_equal(a.token_ids, b.token_ids) for a, b in pairs])
    assert same > 0.98
    again = sample_prompts(model, jobs(40, 30), Sampling(1.0, 0, 1.0, 30, (0,), 0, 7))
    for x, y in zip(runs[0], again, strict=True):
        for a, b in zip(x, y, strict=True):
            assert np.array_equal(a.token_ids, b.token_ids)
            assert np.array_equal(a.entropy, b.entropy)


def test_a_batch_steps_within_the_step_of_another():
    """What a step needs goes with it: nothing of one batch stands where another finds it."""
    model = tiny("llama")
    assert shared_prompt.prepare(model)

    def seated(*prompts: int) -> shared_prompt.Slots:
        slots = shared_prompt.Slots(model)
        slots.seat([slots.read(PROMPTS[prompt]) for prompt in prompts])
        return slots

    def step(slots: shared_prompt.Slots) -> torch.Tensor:
        width = len(slots.lengths)
        return slots.step(torch.arange(1, width + 1), np.zeros(width, int))

    with torch.inference_mode():
        alone = [step(seated(0)), step(seated(1, 2))]
        outer, inner, within = seated(0), seated(1, 2), []

        def between(*_: object) -> None:
            hook.remove()
            within.append(step(inner))

        hook = model.model.layers[0].register_forward_hook(between)
        assert torch.equal(step(outer), alone[0])
    assert torch.equal(within[0], alone[1])


def test_keys_that_do_not_come_from_the_cache_are_refused(monkeypatch):
    """Without its cache's own keys a step would attend to nothing of the prompt, and say nothing."""
    update = shared_prompt._Own.update

    def copied(*args):
        return tuple(part.clone() for part in update(*args))

    monkeypatch.setattr(shared_prompt._Own, "update", copied)
    model = tiny("llama")
    shared_prompt.prepare(model)
    with pytest.raises(CanopyError, match="the attention of llama does not get the cache's own keys"):
        sample_prompts(model, jobs(2, 4), Sampling(1.0, 0, 1.0, 4, (0,), 0, 8))


@pytest.mark.parametrize(
    "policy", [{}, {"top_logprobs": 5}, {"top_k": 9, "temperature": 1.4}, {"top_p": 0.8}]
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_loop_for_a_gpu_samples_the_same_rollouts(family, policy):
    """Fixed slots, positions and lengths kept on the device: run here in torch's own operations."""
    model = tiny(family)
    sampling = Sampling(max_new_tokens=30, end_ids=(0, 3), width=5, **policy)
    assert shared_prompt.prepare(model)
    want = sample_prompts(model, jobs(7, 30), sampling)
    got = [[None] * 7 for _ in PROMPTS]
    counted = []
    with torch.inference_mode():
        sample._sample_captured(model, jobs(7, 30), sampling, got, counted.append)
    assert sum(counted) == sum(len(r.token_ids) for each in got for r in each)
    for a, b in zip(flat(want), flat(got), strict=True):
        assert a.sample == b.sample
        assert a.finish_reason == b.finish_reason
        assert np.array_equal(a.token_ids, b.token_ids)
        for column in ("logprob", "entropy", "eos_logprob"):
            assert getattr(a, column) == pytest.approx(getattr(b, column), abs=1e-5)
        if "top_logprobs" in policy:
            assert a.top_logprobs == pytest.approx(b.top_logprobs, abs=1e-5)
            assert np.array_equal(a.top_token_ids, b.top_token_ids)


def test_the_loop_for_a_gpu_resumes():
    """Rollouts that are there are not sampled again, and the rest are what they would have been."""
    model = tiny("llama")
    sampling = Sampling(max_new_tokens=20, end_ids=(0,), width=4)
    assert shared_prompt.prepare(model)
    whole = [[None] * 5 for _ in PROMPTS]
    with torch.inference_mode():
        sample._sample_captured(model, jobs(5, 20), sampling, whole, None)
        part = [[r if place % 2 else None for place, r in enumerate(each)] for each in whole]
        kept = part[1][1]
        sample._sample_captured(model, jobs(5, 20), sampling, part, None)
    assert part[1][1] is kept
    for a, b in zip(flat(whole), flat(part), strict=True):
        assert np.array_equal(a.token_ids, b.token_ids)


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # qwen2's q, k and v have biases
def test_q_k_and_v_as_one_product_are_what_they_are_apart_and_can_be_trained_after(family):
    model = tiny(family)
    step, prompt = torch.randint(61, (6, 1)), torch.randint(61, (1, 9))
    with torch.no_grad():
        want = [model(ids).logits for ids in (step, prompt)]
    layers = [
        [getattr(module, name) for name in ("q_proj", "k_proj", "v_proj")]
        for module in model.modules()
        if hasattr(module, "q_proj")
    ]
    assert len(layers) == 2
    held = sum(p.numel() for p in model.parameters())
    with torch.inference_mode():
        for parts in layers:
            assert captured._joinable(parts)
            captured._join(parts, 6)
            assert not captured._joinable(parts)
            assert (
                parts[0].weight.untyped_storage().data_ptr()
                == parts[2].weight.untyped_storage().data_ptr()
            )
        got = [model(ids).logits for ids in (step, prompt)]
        for parts in layers:
            captured._part(parts)
    for one, other in zip(got, want, strict=True):
        assert (one - other).abs().max() < 1e-5
    for parts in layers:
        for part in parts:
            assert part.weight.untyped_storage().nbytes() == part.weight.nbytes
    assert sum(p.numel() for p in model.parameters()) == held
    model(torch.randint(61, (2, 5)), labels=torch.randint(61, (2, 5))).loss.backward()
    assert all(part.weight.grad is not None for parts in layers for part in parts)


def test_layers_that_are_not_plain_stay_apart():
    plain = [torch.nn.Linear(4, n) for n in (4, 2, 2)]
    assert captured._joinable(plain)
    for other in (
        None,
        torch.nn.Linear(4, 2, bias=False),
        torch.nn.Linear(4, 2).bfloat16(),
        torch.nn.Identity(),
    ):
        assert not captured._joinable([*plain[:2], other])
