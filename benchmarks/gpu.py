"""The jobs on an NVIDIA GPU: first whether they are right, then how fast: make gpu

    python benchmarks/gpu.py [--device cuda] [--part checks|speed|kernels] [--model 1B]
        [--write docs/performance.md]

Checks: the policy and the step's attention against float64, the Markov chain against its closed form,
equality with the CPU, resuming, memory that runs out, NaN; embedding, reward, scores and fine-tuning
against the CPU. Speed: the sampler beside transformers' generate(output_scores=True), and a step beside
what reading weights and cache once takes at the speed of a copy; models of about 0.1, 1 and 8 billion
parameters with random weights. With --device cpu the same, small, to see that it runs. Checks that fail
make the exit status 1; the table is printed last, and written between its marks in the file named.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import io
import json
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from chain import (
    PROMPTS_TO_A,
    chain_policy,
    closed_form,
    save_chain,
    save_reward_model,
)

import canopy_store
from canopy_store.cli import main as canopy
from canopy_store.errors import DataError
from canopy_store.ingest import (
    captured,
    draw,
    energy,
    engine_transformers,
    policy,
    sample,
    shared_prompt,
)
from canopy_store.ingest.teacher_forcing import score_tokens

POLICIES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_logprobs": 5},
    {"top_k": 50},
    {"top_p": 0.9},
    {"temperature": 1.3, "top_k": 100, "top_p": 0.8},
]
MARKS = "<!-- gpu: written by make gpu -->", "<!-- gpu: end -->"


# ---------------------------------------------------------------- what both parts use


def llama(
    device: str,
    dtype: torch.dtype,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    shared: int,
    size: int,
) -> Any:
    """A Llama of random weights, as its config's own initialisation makes them."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=size,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        max_position_embeddings=4096,
        tie_word_embeddings=hidden < 4096,
        initializer_range=0.05,
        eos_token_id=None,
        bos_token_id=None,
    )
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def jobs(prompts: int, tokens: int, samples: int, steps: int, size: int) -> list[draw.Job]:
    numbers = np.random.default_rng(0)
    return [
        draw.Job(
            numbers.integers(0, size, tokens).tolist(),
            range(samples),
            functools.partial(lambda p, s: draw.uniforms("gpu", 0, str(p), s, steps), p),
            f"prompt {p}",
        )
        for p in range(prompts)
    ]


def flat(rollouts: list[list[draw.Rollout]]) -> list[draw.Rollout]:
    return [rollout for each in rollouts for rollout in each]


def differences(a: list[draw.Rollout], b: list[draw.Rollout]) -> tuple[int, float]:
    """How many rollouts have other tokens, and the largest difference of the others' records (nats)."""
    other, largest = 0, 0.0
    for x, y in zip(a, b, strict=True):
        if list(x.token_ids) != list(y.token_ids):
            other += 1
            continue
        for name in ("logprob", "entropy", "eos_logprob"):
            one, two = getattr(x, name), getattr(y, name)
            there = np.isfinite(one)
            assert (there == np.isfinite(two)).all()
            largest = max(largest, float(np.abs(one[there] - two[there]).max(initial=0)))
    return other, largest


def parted(
    model: Any, work: list[draw.Job], sampling: draw.Sampling, a: list[Any], b: list[Any]
) -> float:
    """How far from its edge, in probability, a number drawn lay where two runs' tokens first differ.

    Rounding moves the edges between tokens: a number that lies between where two runs have an edge is
    another token in each. Where tokens are sorted it also swaps those that are as good as equal, and
    takes a last one into top-p's set or not, which moves all edges by its probability. Anything farther
    is a fault.
    """
    farthest = 0.0
    for job, ones, others in zip(work, a, b, strict=True):
        for sample_number, one, other in zip(job.samples, ones, others, strict=True):
            x, y = one.token_ids.tolist(), other.token_ids.tolist()
            if x == y:
                continue
            at = next(i for i, (s, t) in enumerate(zip(x, y, strict=False)) if s != t)
            with torch.inference_mode():
                ids = torch.tensor([job.prompt_ids + x[:at]], device=model.device)
                logits = model(input_ids=ids, logits_to_keep=1).logits[0, -1:].double()
            found = policy.sampling_policy(logits, sampling.temperature, sampling.top_k, sampling.top_p)
            order = range(found.probabilities.shape[1]) if found.ids is None else found.ids[0].tolist()
            places = sorted(list(order).index(token) for token in (x[at], y[at]))
            mass = found.probabilities[0].double()
            if found.ids is not None and (mass[places].log().diff().abs() < 1e-4).all():
                continue
            edges = mass.cumsum(0)[places[0] : places[1]] / mass.sum()  # between the two tokens
            moved = mass[mass > 0].min() if sampling.top_p < 1 else 0.0
            away = (edges - job.draw(sample_number)[at]).abs().max() - moved
            farthest = max(farthest, float(away))
    return farthest


def run(*arguments: object) -> None:
    """A command of the package's, in this process; its words only where it fails."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = canopy([str(a) for a in arguments])
    assert code == 0, said.getvalue()[-2000:]


# ---------------------------------------------------------------- checks


def check_policy(device: str, folder: Path) -> str:
    """Record and draw of every policy against float64, at two vocabularies and number formats."""
    torch.manual_seed(1)
    worst = far = 0.0
    for size in (50_257, 128_256) if device == "cuda" else (3_000,):
        for dtype in (torch.float32, torch.bfloat16):
            logits = (torch.randn(32, size, device=device) * 3).to(dtype)
            logits[3, : size // 2] = -torch.inf
            uniform = torch.rand(32, device=device, dtype=torch.float64)
            for options in POLICIES:
                sampling = draw.Sampling(end_ids=(1, size - 1), **options)
                ends = policy.Ends(sampling.end_ids, size, logits.device)
                step = policy.take_step(logits, sampling, ends, uniform=uniform)
                wide = logits.double() / sampling.temperature
                if sampling.top_k:
                    wide = wide.masked_fill(wide < wide.topk(sampling.top_k).values[:, -1:], -torch.inf)
                if sampling.top_p < 1:
                    order = wide.softmax(-1).sort(dim=-1, descending=True, stable=True)
                    keep = order.values.cumsum(-1) - order.values < sampling.top_p - 1e-9
                    kept = torch.zeros_like(keep).scatter(1, order.indices, keep)
                    kept[torch.arange(32), step.tokens] = True  # the edge's token may tip either way
                    wide = wide.masked_fill(~kept, -torch.inf)
                log = wide.log_softmax(-1)
                entropy = torch.special.entr(log.exp()).sum(-1)
                want = torch.stack(
                    [
                        log.gather(1, step.tokens[:, None])[:, 0],
                        entropy,
                        log[:, list(sampling.end_ids)].logsumexp(-1),
                    ]
                )
                there = torch.isfinite(want) & torch.isfinite(step.record)
                # ties at top-k's edge and top-p's last token are the kernel's to choose
                limit = 3 if sampling.top_k or sampling.top_p < 1 else 2
                error = (step.record - want)[:limit][there[:limit]].abs().max().item()
                if sampling.top_k == 0 and sampling.top_p == 1:
                    assert (torch.isfinite(want) == torch.isfinite(step.record)).all()
                    worst = max(worst, error)
                    cumulative = log.exp().cumsum(-1)
                    above = cumulative.gather(1, step.tokens[:, None])[:, 0]
                    below = above - log.exp().gather(1, step.tokens[:, None])[:, 0]
                    far = max(far, (below - uniform).max().item(), (uniform - above).max().item())
                elif dtype == torch.float32:  # the edges of bfloat16 are ties
                    # at top-p's edge float32's sum may keep a token more, or less, than float64's
                    assert error < (2e-4 if sampling.top_p == 1 else 2e-3), (options, error)
    assert worst < 2e-4, worst
    assert far < 1e-6, far
    return f"record within {worst:.1e} nats, draws within {far:.1e} of their uniforms"


def check_attention(device: str, folder: Path) -> str:
    """A step's attention against float64, over shapes of heads, sizes, prompts and lengths."""
    if device == "cpu":
        return "no GPU: not run"
    from canopy_store.ingest import kernels

    torch.manual_seed(2)
    found = {torch.float32: 0.0, torch.bfloat16: 0.0}
    for dtype in found:
        for width, heads, shared, size, room in (
            (40, 8, 2, 64, 100),
            (24, 9, 3, 64, 33),
            (16, 32, 8, 128, 257),
            (9, 4, 4, 80, 5),
        ):
            counts = [0, 5, 130]
            ends = np.cumsum(counts)
            query = torch.randn(width, heads, size, device=device, dtype=dtype)
            new, own, prompts = (
                [torch.randn(*shape, size, device=device, dtype=dtype) for _ in range(2)]
                for shape in ((width, shared), (width, shared, room), (shared, int(ends[-1])))
            )
            of = torch.arange(width) % 3
            order = torch.full((6, 16), -1, dtype=torch.int32)
            span = torch.zeros(2, 6, dtype=torch.int32)
            for p in range(3):
                slots = (of == p).nonzero()[:, 0].int()
                order[p, : len(slots)] = slots
                span[:, p] = torch.tensor([int(ends[p]) - counts[p], counts[p]])
            length = torch.randint(0, room, (width,), device=device, dtype=torch.int32)
            length[0] = 0
            live = torch.ones(width, dtype=torch.bool, device=device)
            got = kernels.attend(
                query,
                tuple(new),
                tuple(own),
                tuple(prompts),
                order.to(device),
                *span.to(device),
                length,
                live,
                size**-0.5,
            )
            for slot in range(width):
                p, n = int(of[slot]), int(length[slot])
                keys, values = (
                    torch.cat(
                        [
                            prompts[i][:, ends[p] - counts[p] : ends[p]],
                            own[i][slot, :, :n],
                            new[i][slot][:, None],
                        ],
                        1,
                    ).double()
                    for i in range(2)
                )
                q = query[slot].double().view(shared, -1, size)
                want = ((q @ keys.transpose(1, 2)) * size**-0.5).softmax(-1) @ values
                error = (got[slot].double().view_as(want) - want).abs().max() / want.abs().max()
                found[dtype] = max(found[dtype], error.item())
                assert (own[0][slot, :, n] == new[0][slot]).all()
    assert found[torch.float32] < 1e-5, found
    assert found[torch.bfloat16] < 1e-2, found
    return ", ".join(f"{str(d).removeprefix('torch.')} within {e:.1e}" for d, e in found.items())


def check_markov(device: str, folder: Path) -> str:
    """20,000 rollouts of the chain, by the command line, against the closed form (CPU: 1,000)."""
    chain = save_chain(folder / "chain")
    prompts = folder / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS_TO_A))
    said, samples = [], 2000 if device == "cuda" else 100
    for temperature, top_k in ((1.0, 0), (1.5, 6))[: 2 if device == "cuda" else 1]:
        store = folder / f"s{top_k}"
        run(
            *("ingest", "rollouts", "--store", store, "--model", chain, "--family", "chain"),
            *("--variant", "base", "--task", "walk", "--prompts", prompts, "--samples", samples),
            *("--max-new-tokens", 500, "--batch-size", 1024, "--temperature", temperature),
            *("--top-k", top_k, "--seed", 11, "--device", device, "--dtype", "float32"),
        )
        truth = closed_form(chain_policy(temperature, top_k), start=1)
        rows = canopy_store.read(store, "rollouts")
        assert len(rows) == 10 * samples
        assert (rows["finish_reason"] == "stop").all()
        for column, name in (
            ("entropy_sum", "ce_star"),
            ("surprisal_sum", "ce_star"),
            ("n_tokens", "mean_length"),
            ("stop_entropy_sum", "stop_entropy"),
        ):
            values = rows[column].to_numpy().astype(float)
            z = (values.mean() - truth[name]) / (values.std(ddof=1) / np.sqrt(len(values)))
            assert abs(z) < 4, (column, z)
        said.append(f"{rows['entropy_sum'].mean():.3f} for {truth['ce_star']:.3f}")
    run("verify", "--store", folder / "s0")
    return "CE* " + ", ".join(said)


def check_same_as_cpu(device: str, folder: Path) -> str:
    """Rollouts of 4 prompts in float32 beside those of the CPU; scores beside the log, bfloat16 too."""
    shape = (512, 1024, 6, 8, 2, 32_000) if device != "cpu" else (64, 128, 2, 4, 2, 500)
    there = llama(device, torch.float32, *shape)
    here = llama("cpu", torch.float32, *shape)
    here.load_state_dict(there.state_dict())
    ends = tuple(range(0, shape[-1], 60))
    work = jobs(4, 50, 16, 40, shape[-1])
    other, largest, count, farthest = 0, 0.0, 0, 0.0
    for options in POLICIES if device == "cuda" else POLICIES[:1]:
        sampling = draw.Sampling(max_new_tokens=40, end_ids=ends, width=24, **options)
        one = sample.sample_prompts(there, work, sampling)
        two = sample.sample_prompts(here, work, sampling)
        found = differences(flat(one), flat(two))
        other, largest, count = other + found[0], max(largest, found[1]), count + len(flat(one))
        farthest = max(farthest, parted(here, work, sampling, one, two))
    assert other < 0.2 * count, (other, count)  # 32,000 edges a token, which rounding moves by 1e-7
    assert farthest < 1e-5, farthest
    assert largest < 1e-3, largest
    # scored again, teacher-forced, on the device
    sampling = draw.Sampling(max_new_tokens=40, end_ids=ends, width=24)
    rescored = 0.0
    half = llama(device, torch.bfloat16, *shape)
    half.load_state_dict({k: v.to(torch.bfloat16) for k, v in there.state_dict().items()})
    drift = []
    for model in (there, half):
        rollouts = sample.sample_prompts(model, work, sampling)
        prompts = [work[j].prompt_ids for j, each in enumerate(rollouts) for _ in each]
        tokens = [r.token_ids.tolist() for r in flat(rollouts)]
        scores = score_tokens(model, prompts, tokens, sampling)
        gap = [np.abs(s[0] - r.logprob) for s, r in zip(scores, flat(rollouts), strict=True)]
        if model is there:
            rescored = max(float(g.max()) for g in gap)
        else:
            drift = np.concatenate(gap)
    assert rescored < 1e-3, rescored
    assert np.mean(drift) < 0.02, np.mean(drift)
    return (
        f"{other} of {count} rollouts part, each where its number lay within {farthest:.1e} of the edge "
        f"between two tokens; the others' records within {largest:.1e}; rescored within "
        f"{rescored:.1e}, bfloat16 {np.mean(drift):.1e} in the mean"
    )


def check_resume(device: str, folder: Path) -> str:
    """A run broken off after its second shard and taken up again beside one in one go."""
    chain = save_chain(folder / "chain")
    prompts = folder / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS_TO_A))

    def ingest(store: Path) -> None:
        run(
            *("ingest", "rollouts", "--store", store, "--model", chain, "--family", "chain"),
            *("--variant", "base", "--task", "walk", "--prompts", prompts, "--samples", 40),
            *("--max-new-tokens", 60, "--prompts-per-shard", 2, "--device", device),
        )

    class Broken(BaseException):
        pass

    plain, calls = engine_transformers.sample_prompts, []

    def breaking(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise Broken
        return plain(*arguments)

    engine_transformers.sample_prompts = breaking
    try:
        ingest(folder / "broken")
    except Broken:
        pass
    finally:
        engine_transformers.sample_prompts = plain
    ingest(folder / "broken")
    ingest(folder / "whole")
    one, two = (
        canopy_store.read(folder / name, "rollouts").sort("prompt_id", "sample")
        for name in ("broken", "whole")
    )
    columns = ["token_ids", "logprob", "entropy", "eos_logprob", "text"]
    assert len(calls) == 3
    assert one.select(columns).equals(two.select(columns))
    return f"{len(one)} rollouts, the same bits"


def check_memory(device: str, folder: Path) -> str:
    """A width that does not fit is halved, and the rollouts are those of a width that does."""
    if device == "cpu":
        return "no GPU: not run"
    model = llama(device, torch.bfloat16, 512, 1024, 6, 8, 2, 32_000)
    work = jobs(1, 50, 512, 600, 32_000)
    sampling = draw.Sampling(max_new_tokens=600, width=512, end_ids=tuple(range(0, 32_000, 60)))
    fixed, slot = sample.footprint(model, sampling, [50])
    gc.collect()
    torch.cuda.empty_cache()
    everything = torch.cuda.mem_get_info()[1]
    room = torch.cuda.memory_reserved() + fixed + int(0.4 * 512 * slot)
    said: list[str] = []
    torch.cuda.set_per_process_memory_fraction(room / everything)
    try:
        found = flat(sample.sample_prompts(model, work, sampling, say=said.append))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert said, "it fitted"
    assert len(found) == 512
    return said[-1]


def check_foretold(device: str, folder: Path) -> str:
    """The most memory that sampling takes, beside what is foretold."""
    if device == "cpu":
        return "no GPU: not run"
    model = llama(device, torch.bfloat16, 1024, 4096, 8, 16, 4, 128_256)
    ratios = []
    for options in ({}, {"top_k": 100}, {"top_p": 0.9}):
        sampling = draw.Sampling(max_new_tokens=128, width=256, end_ids=(5,), **options)
        work = jobs(4, 200, 64, 128, 128_256)
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        sample.sample_prompts(model, work, sampling)
        fixed, slot = sample.footprint(model, sampling, [200] * 4)
        ratios.append((torch.cuda.max_memory_reserved() - before) / (fixed + 256 * slot))
    assert max(ratios) < 1.5, ratios
    return "taken to foretold: " + ", ".join(f"{r:.2f}" for r in ratios) + " (all tokens, top-k, top-p)"


def check_energy(device: str, folder: Path) -> str:
    """Joules of work on the device, and the watts that they come to."""
    used, began = energy.meter(device), time.perf_counter()
    if device == "cuda":
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        while time.perf_counter() - began < 2:
            for _ in range(20):
                a @ a
            torch.cuda.synchronize()
    joules, method = used()
    if joules is None:
        return "not to be read here"
    watts = joules / (time.perf_counter() - began)
    assert device == "cpu" or 50 < watts < 1500, watts
    return f"{joules:.0f} J, {watts:.0f} W by {method}"


def check_nan(device: str, folder: Path) -> str:
    """Damaged weights are one line that names the prompt, the sample and the step."""
    model = llama(device, torch.float32, 64, 128, 2, 4, 2, 500)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = torch.nan
    said = "damaged weights were sampled from"
    try:
        sample.sample_prompts(model, jobs(1, 5, 4, 10, 500), draw.Sampling(max_new_tokens=10))
    except DataError as error:
        said = str(error).split(";")[0]
    assert "step 1" in said, said
    return said


def check_other_jobs(device: str, folder: Path) -> str:
    """Embedding, reward, scores and fine-tuning on the device beside the CPU."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    chain = save_chain(folder / "chain")
    reward = save_reward_model(chain, folder / "reward")
    modules = [Transformer(str(chain)), Pooling(8), Dense(8, 3), Normalize()]
    modules[0].tokenizer.pad_token = "a"
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder / "dense"))
    prompts, data = folder / "p.jsonl", folder / "data.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS_TO_A))
    data.write_text(
        "".join(json.dumps({"prompt": "a b", "completion": "c d e"}) + "\n" for _ in range(32))
    )
    tables = {}
    for where in dict.fromkeys(("cpu", device)):
        store = folder / f"s-{where}"
        here = ("--device", where, "--dtype", "float32")
        run(
            *("ingest", "rollouts", "--store", store, "--model", chain, "--family", "chain"),
            *("--variant", "base", "--task", "walk", "--prompts", prompts, "--samples", 40),
            *("--max-new-tokens", 60, *here),
        )
        run(
            "ingest",
            "embed",
            "--store",
            store,
            "--embedder",
            folder / "dense",
            "--name",
            "dense",
            "--device",
            where,
        )
        run("ingest", "reward", "--store", store, "--reward-model", reward, *here)
        run(
            "ingest",
            "score",
            "--store",
            store,
            "--scorer",
            chain,
            "--name",
            "scorer",
            "--policy",
            "full",
            *here,
        )
        run(
            *("ingest", "finetune", "--store", store, "--model", chain, "--family", "chain"),
            *(
                "--variant",
                "sft",
                "--data",
                data,
                "--out",
                folder / f"child-{where}",
                "--steps",
                8,
                *here,
            ),
        )
        tables[where] = {
            name: canopy_store.read(store, name).sort("prompt_id", "sample")
            for name in ("rollouts", "embeddings", "rewards", "scores")
        }
    one, two = tables["cpu"], tables[device]
    same = one["rollouts"]["token_ids"] == two["rollouts"]["token_ids"]
    gaps = {}
    for table, column in (("embeddings", "embedding"), ("rewards", "reward"), ("scores", "entropy_sum")):
        a, b = (np.array(t[table][column].to_list(), dtype=float)[same.to_numpy()] for t in (one, two))
        gaps[table] = np.abs(a - b).max()
    assert same.mean() > 0.98
    assert max(gaps.values()) < 1e-3, gaps
    weights = [
        transformers.AutoModelForCausalLM.from_pretrained(folder / f"child-{w}").state_dict()
        for w in tables
    ]
    gaps["weights after 8 steps"] = max(
        (weights[0][k] - weights[-1][k]).abs().max().item() for k in weights[0]
    )
    assert gaps["weights after 8 steps"] < 1e-3
    return ", ".join(f"{k} {v:.1e}" for k, v in gaps.items())


CHECKS: dict[str, Callable[[str, Path], str]] = {
    "policy against float64": check_policy,
    "attention against float64": check_attention,
    "Markov chain, closed form": check_markov,
    "equal to the CPU": check_same_as_cpu,
    "resuming": check_resume,
    "out of memory": check_memory,
    "memory foretold": check_foretold,
    "NaN": check_nan,
    "energy": check_energy,
    "embed, reward, score, finetune": check_other_jobs,
}


def checks(device: str, names: list[str]) -> tuple[list[str], bool]:
    lines, ok = ["| check | found |", "|---|---|"], True
    for name in names:
        check = CHECKS[name]
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = check(device, Path(folder))
            except Exception as error:
                import traceback

                traceback.print_exc()
                ok, found = (
                    False,
                    f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
                )
        print(f"{name}: {found} ({time.perf_counter() - began:.0f} s)", flush=True)
        lines.append(f"| {name} | {found} |")
    return lines, ok


# ---------------------------------------------------------------- speed


SHAPES = {  # hidden, inner, layers, heads, key-value heads, vocabulary
    "0.1B": (576, 1536, 30, 9, 3, 49_152),
    "1B": (2048, 8192, 16, 32, 8, 128_256),
    "8B": (4096, 14_336, 32, 32, 8, 128_256),
}


@contextlib.contextmanager
def timed(device: str) -> Iterator[list[float]]:
    seconds: list[float] = []
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    yield seconds
    if device == "cuda":
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - began)


def median_ms(call: Callable[[], Any], times: int = 15) -> float:
    """Milliseconds of a call on the GPU, the median."""
    found = []
    for _ in range(times):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        after.synchronize()
        found.append(before.elapsed_time(after))
    return statistics.median(found)


def ceilings() -> tuple[float, float]:
    """Bytes a second of a copy, read and written; operations a second of a bfloat16 product."""
    big = torch.empty(2 << 30, dtype=torch.uint8, device="cuda").random_()
    other = torch.empty_like(big)
    copy = median_ms(lambda: other.copy_(big))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a @ b
    product = median_ms(lambda: a @ b)
    return 2 * len(big) / copy * 1e3, 2 * 8192**3 / product * 1e3


def generate(model: Any, ids: list[int], samples: int, steps: int) -> float:
    """Tokens a second of what scripts do: generate with scores, entropies afterwards."""
    device = model.device.type
    model.set_attn_implementation("sdpa")
    prompt = torch.tensor([ids], device=model.device)
    with torch.inference_mode(), timed(device) as seconds:
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            num_return_sequences=samples,
            max_new_tokens=steps,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        logprobs = torch.stack(out.scores, 1).log_softmax(-1)
        torch.special.entr(logprobs.exp()).sum(-1).cpu()
        logprobs.gather(2, out.sequences[:, len(ids) :, None]).cpu()
    return samples * steps / seconds[0]


def fitting(call: Callable[[], float]) -> float | None:
    """What a call gives, None where memory ran out."""
    try:
        return call()
    except torch.OutOfMemoryError:
        return None
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def begin(batch: captured.Batch, prompt: list[int]) -> None:
    """Gives every slot of the batch to a rollout of its one prompt, the first."""
    width, steps = batch.noise.shape
    batch.seat([0] * width)
    noise = np.random.default_rng(0).random((width, steps))
    batch.begin(list(range(width)), [prompt[-1]] * width, [len(prompt) - 1] * width, noise)


@torch.inference_mode()
def step_ms(
    model: Any, prompt: list[int], width: int, steps: int, sampling: draw.Sampling
) -> tuple[float, float]:
    """Milliseconds of a captured step half-way through, whole and without policy and record."""
    shared_prompt.prepare(model)
    batch = captured.Batch(model, sampling, width, {0: prompt})
    with captured.fused_layers(model, width):
        step = captured._captured(batch, print)
        forward = torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward):
            batch.forward()
        begin(batch, prompt)
        for _ in range(steps // 2 - 5):
            step()
        alone = median_ms(forward.replay)
        whole = median_ms(step, 9)
    return whole, alone


def row(
    device: str, model: Any, tokens: int, width: int, steps: int, speeds: tuple[float, float]
) -> list[str]:
    """A line of the table: one model, one prompt of so many tokens, so many rollouts of it."""
    config = model.config
    work = jobs(1, tokens, width, steps, config.vocab_size)
    sampling = draw.Sampling(max_new_tokens=steps, width=width, end_ids=())

    def ours() -> float:
        sample.sample_prompts(model, work, sampling)
        with timed(device) as seconds:
            sample.sample_prompts(model, work, sampling)
        return width * steps / seconds[0]

    fitting(lambda: generate(model, work[0].prompt_ids, width, 4))  # neither's first call is timed
    theirs = fitting(lambda: generate(model, work[0].prompt_ids, width, steps))
    mine = fitting(ours)
    if mine is None:
        return ["out of memory"] + [""] * 5
    found = [f"{mine:,.0f}", f"{mine / theirs:.1f}" if theirs else "does not fit"]
    if device == "cpu":
        return found + [""] * 4
    whole, alone = step_ms(model, work[0].prompt_ids, width, steps, sampling)
    bandwidth, rate = speeds
    read = sum(p.numel() for p in model.parameters())
    if not config.tie_word_embeddings:  # of which a step reads its own rows alone
        read -= model.get_input_embeddings().weight.numel()
    size = config.hidden_size // config.num_attention_heads
    token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * size  # bytes
    floor = (2 * read + token * (tokens + width * steps / 2)) / bandwidth * 1e3
    reckoned = 2 * read * width / rate * 1e3
    return [
        *found,
        f"{whole:.2f}",
        f"{(whole - alone) / whole:.0%}",
        f"{floor:.2f}" + (f" (products {reckoned:.2f})" if reckoned > floor else ""),
        f"{floor / whole:.2f}",
    ]


def kernels_of_a_step(names: list[str], width: int = 256, times: int = 5) -> list[str]:
    """What a captured step spends its milliseconds on, kernel by kernel."""
    from torch.profiler import ProfilerActivity, profile

    lines = []
    for name in names:
        model = llama("cuda", torch.bfloat16, *SHAPES[name])
        prompt = jobs(1, 110, 1, 1, model.config.vocab_size)[0].prompt_ids
        sampling = draw.Sampling(max_new_tokens=64, width=width, end_ids=())
        shared_prompt.prepare(model)
        with torch.inference_mode(), captured.fused_layers(model, width):
            batch = captured.Batch(model, sampling, width, {0: prompt})
            step = captured._captured(batch, print)
            begin(batch, prompt)
            for _ in range(30):
                step()
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                for _ in range(times):
                    step()
        found = sorted(seen.key_averages(), key=lambda e: -e.device_time_total)
        whole = sum(e.device_time_total for e in found) / times / 1e3
        lines.append(f"{name}, {width} rollouts: {whole:.2f} ms of kernels a step")
        lines += [
            f"  {e.device_time_total / times / 1e3:7.3f} ms  {e.count // times:4d} ×  {e.key[:90]}"
            for e in found[:14]
        ]
        del model, batch, step
        gc.collect()
        torch.cuda.empty_cache()
    return lines


def speed(device: str, names: list[str]) -> list[str]:
    cuda = device == "cuda"
    speeds = ceilings() if cuda else (0.0, 0.0)
    lines = [
        "| model | prompt | rollouts | tokens/s | to generate | ms a step | of it policy and record "
        "| floor, ms | of the floor's speed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    steps = 64 if cuda else 4
    shapes = {name: SHAPES[name] for name in names} if cuda else {"tiny": (64, 128, 2, 4, 2, 500)}
    cases = [(t, w) for t in (110, 800) for w in (32, 256, 512)] if cuda else [(20, 8)]
    for name, shape in shapes.items():
        model = llama(device, torch.bfloat16 if cuda else torch.float32, *shape)
        for tokens, width in cases:
            found = row(device, model, tokens, width, steps, speeds)
            lines.append("| " + " | ".join([name, str(tokens), str(width), *found]) + " |")
            print(lines[-1], flush=True)
        del model
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    if cuda:
        bandwidth, rate = speeds
        lines += [
            "",
            f"A copy moves {bandwidth / 1e12:.2f} TB/s, a bfloat16 product of 8,192 × 8,192 runs at "
            f"{rate / 1e12:.0f} TFLOP/s.",
        ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--part", choices=["checks", "speed", "kernels"])
    parser.add_argument("--check", choices=list(CHECKS), nargs="+", default=list(CHECKS))
    parser.add_argument("--model", choices=list(SHAPES), nargs="+", default=list(SHAPES))
    parser.add_argument("--write", type=Path, help="file whose table is renewed")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU here, or a torch without CUDA; to see that it runs: make gpu DEVICE=cpu")
    card = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU"
    lines = [f"{card}, torch {torch.__version__}, transformers {transformers.__version__}.", ""]
    ok = True
    if options.part == "kernels":
        print("\n".join(kernels_of_a_step(options.model)))
        return
    if options.part != "speed":
        found, ok = checks(options.device, options.check)
        lines += [*found, ""]
    if options.part != "checks":
        lines += speed(options.device, options.model)
    print("\n".join(lines))
    if options.write:
        text = options.write.read_text()
        body = "\n".join([MARKS[0], *lines, MARKS[1]])
        options.write.write_text(re.sub(f"{MARKS[0]}.*{MARKS[1]}", lambda _: body, text, flags=re.S))
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
