"""Sampling with its record, beside generate(output_scores=True): python benchmarks/bench_ingest.py MODEL

MODEL is a folder, as demo-real leaves one: demo-real-output/base. Each measurement is a process of its
own: tokens/s of 32 rollouts of each prompt at top-k 100, and the peak of memory above the weights,
beside the foretold one. The sampler takes several prompts together; generate, which would take them
one after the other, is measured on one, as are the steps by which the sampler came to its speed.

--cpu-time counts the seconds of one thread: for a machine where other work runs.
--widths 4 8 16 32 instead: how many rollouts and tokens other widths than 32 change.
--floor 32 128 instead: how long a step's products take at these widths.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench_query import machine


def memory(what: str) -> float:
    """This process's memory in MB: VmRSS is held now, VmHWM the most since `forget_peak` (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(what)).split()[1]) / 1024


def forget_peak() -> None:
    """Loading a model takes more than holding it: what comes after is measured alone."""
    Path("/proc/self/clear_refs").write_text("5")


def loaded(path: str, prompt_tokens: int, prompts: int) -> tuple[Any, list[list[int]], int]:
    from canopy_store.ingest.models import end_token_ids, load_model

    model, tokenizer, _ = load_model(path, "cpu", "float32")
    text = "The canopy holds most of a forest's leaves, and most of its light. " * 80
    ids = tokenizer(text)["input_ids"]
    return (
        model,
        [ids[p : p + prompt_tokens] for p in range(prompts)],
        end_token_ids(model, tokenizer)[0],
    )


def generate(model: Any, prompts: list[list[int]], end: int, samples: int, steps: int) -> int:
    """What scripts do: generate with scores, entropies afterwards."""
    import torch

    torch.manual_seed(0)
    tokens = 0
    for ids in prompts:
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([ids]),
                do_sample=True,
                num_return_sequences=samples,
                max_new_tokens=steps,
                top_k=100,
                top_p=1.0,
                temperature=1.0,
                eos_token_id=end,
                pad_token_id=end,
                output_scores=True,
                return_dict_in_generate=True,
            )
            logprobs = torch.stack(out.scores, 1).log_softmax(-1)  # (samples, steps, V)
            torch.special.entr(logprobs.exp()).sum(-1)
        new = out.sequences[:, len(ids) :]
        ended = (new == end).int().cumsum(1)
        tokens += int((ended - (new == end).int() == 0).sum())
    return tokens


def policy(end: int, steps: int, width: int) -> Any:
    from canopy_store.ingest.draw import Sampling

    return Sampling(1.0, 100, 1.0, steps, (end,), 0, width)


def ours(
    model: Any, prompts: list[list[int]], end: int, samples: int, steps: int, width: int = 0
) -> list[Any]:
    """The sampler's rollouts, of all prompts, at a width; by default as wide as the work is."""
    from canopy_store.ingest import draw, sample

    jobs = [
        draw.Job(ids, range(samples), lambda s, p=p: draw.uniforms("bench", 0, str(p), s, steps))
        for p, ids in enumerate(prompts)
    ]
    sampling = policy(end, steps, width or min(128, samples * len(prompts)))
    return [r for rollouts in sample.sample_prompts(model, jobs, sampling) for r in rollouts]


def leave_out_the_record() -> None:
    """The loop without its statistics: entropy and the chance of ending are not taken."""
    from canopy_store.ingest.policy import Policy

    Policy.entropy = lambda self: self.logprobs[:, 0]  # type: ignore[method-assign]
    Policy.event_logprob = lambda self, member: self.logprobs[:, 0]  # type: ignore[method-assign]


def repeat_the_cache() -> None:
    """The loop that reads the prompt once, and then keeps its keys and values for every rollout."""
    from canopy_store.ingest import sample

    sample._sample_shared = sample._sample_repeated


def multiply_as_usual() -> None:
    """The loop with torch's own order of a linear layer's product."""
    from canopy_store.ingest import shared_prompt

    shared_prompt.weights_first = contextlib.nullcontext  # type: ignore[assignment]


# What the sampler gained, step by step, and what its record costs.
VARIANTS = {
    "prompt read once": repeat_the_cache,
    "and kept once": multiply_as_usual,
    "and weights first: canopy": lambda: None,
    "canopy without its record": leave_out_the_record,
}


def one(what: str, options: argparse.Namespace) -> dict[str, float]:
    import torch

    from canopy_store.ingest import sample

    clock = time.perf_counter
    if options.cpu_time:
        torch.set_num_threads(1)
        clock = time.thread_time
    size, prompts = options.prompt_tokens[0], options.prompts[0]
    work = (*loaded(options.model, size, prompts), options.samples, options.new_tokens)
    VARIANTS.get(what, lambda: None)()
    forget_peak()
    before = memory("VmRSS")
    began = clock()
    tokens = generate(*work) if what == "generate" else sum(len(r.token_ids) for r in ours(*work))
    seconds = clock() - began
    width = min(128, options.samples * prompts)
    fixed, slot = sample.footprint(work[0], policy(work[2], options.new_tokens, width), [size] * prompts)
    return {
        "rate": tokens / seconds,
        "memory": memory("VmHWM") - before,
        "foretold": (fixed + width * slot) / 2**20,
        "tokens": tokens,
    }


def flips(options: argparse.Namespace) -> None:
    """How far rollouts at other widths differ from those at the last of ``widths``."""
    work = (*loaded(options.model, options.prompt_tokens[0], 4), options.samples, options.new_tokens)
    *others, last = options.widths
    expected = ours(*work, width=last)
    for width in others:
        pairs = list(zip(ours(*work, width=width), expected, strict=True))
        same = [list(a.token_ids) == list(b.token_ids) for a, b in pairs]
        # once a token differs, the rest of the rollout is another text
        tipped = sum(
            sum(x != y for x, y in zip(a.token_ids, b.token_ids, strict=False)) for a, b in pairs
        )
        tokens = sum(len(b.token_ids) for _, b in pairs)
        print(
            f"width {width} beside {last}: {same.count(False)} of {len(same)} rollouts, "
            f"{tipped} of {tokens} tokens differ",
            flush=True,
        )


def floor(options: argparse.Namespace) -> None:
    """The time of a step's products alone, over every linear layer: no sampler takes less."""
    import torch

    from canopy_store.ingest import shared_prompt

    model, _, _ = loaded(options.model, 1, 1)
    layers = [layer for layer in model.modules() if type(layer) is torch.nn.Linear]
    with torch.inference_mode(), shared_prompt.weights_first(model):
        for width in options.floor:
            inputs = {d: torch.randn(d, width).t()[:, None] for d in {x.in_features for x in layers}}
            times = []
            for _ in range(11):
                began = time.perf_counter()
                for layer in layers:
                    layer(inputs[layer.in_features])
                times.append(time.perf_counter() - began)
            seconds = statistics.median(times)
            work = 2 * width * sum(x.in_features * x.out_features for x in layers)
            print(
                f"width {width}: {seconds * 1e3:.0f} ms a step, {width / seconds:.0f} tokens/s, "
                f"{work / seconds / 1e9:.0f} GFLOP/s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--prompt-tokens", type=int, nargs="*", default=[110, 800])
    parser.add_argument("--prompts", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--repeat", type=int, default=1, help="runs of each, of which medians are shown")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--widths", type=int, nargs="*")
    parser.add_argument("--floor", type=int, nargs="*")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options)))
        return
    if options.widths:
        flips(options)
        return
    if options.floor:
        floor(options)
        return
    print(f"{machine()}; {options.samples} rollouts, {options.new_tokens} new tokens, top-k 100")
    print("| prompts | tokens each | | tokens/s | to generate | MB above the weights | foretold |")
    print("|---|---|---|---|---|---|---|")
    first, *more = options.prompts
    cases = [("generate", first), *((name, first) for name in VARIANTS)]
    cases += itertools.product(list(VARIANTS)[2:], more)
    for size in options.prompt_tokens:
        found: dict[Any, list[dict[str, float]]] = {case: [] for case in cases}
        for _, (name, prompts) in itertools.product(range(options.repeat), cases):  # in turn
            command = [
                sys.executable,
                __file__,
                options.model,
                "--one",
                name,
                "--prompt-tokens",
                str(size),
                "--prompts",
                str(prompts),
                "--samples",
                str(options.samples),
                "--new-tokens",
                str(options.new_tokens),
            ]
            command += ["--cpu-time"] * options.cpu_time
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            found[name, prompts].append(json.loads(done.stdout.splitlines()[-1]))
        base = statistics.median(run["rate"] for run in found[cases[0]])
        for (name, prompts), runs in found.items():
            rate, peak = (statistics.median(run[x] for run in runs) for x in ("rate", "memory"))
            foretold = "" if name == "generate" else f"{runs[0]['foretold']:.0f}"
            print(
                f"| {prompts} | {size} | {name} | {rate:.1f} | {rate / base:.1f} | "
                f"{peak:.0f} | {foretold} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
