"""Sampling with its record, beside generate(output_scores=True): python benchmarks/bench_ingest.py MODEL

MODEL is a folder, as demo-real leaves one: demo-real-output/base. Each measurement is a process of its
own: tokens/s of 32 rollouts of one prompt at top-k 100, and the peak of memory above the weights.
"""

from __future__ import annotations

import argparse
import json
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


def loaded(path: str, prompt_tokens: int) -> tuple[Any, list[int], int]:
    from canopy_store.ingest.models import end_token_ids, load_model

    model, tokenizer, _ = load_model(path, "cpu", "float32")
    text = "The canopy holds most of a forest's leaves, and most of its light. " * 80
    ids = tokenizer(text)["input_ids"][:prompt_tokens]
    return model, ids, end_token_ids(model, tokenizer)[0]


def generate(model: Any, ids: list[int], end: int, samples: int, steps: int) -> int:
    """What scripts do: generate with scores, entropies afterwards."""
    import torch

    torch.manual_seed(0)
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([ids]), do_sample=True, num_return_sequences=samples, max_new_tokens=steps,
            top_k=100, top_p=1.0, temperature=1.0, eos_token_id=end, pad_token_id=end,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        logprobs = torch.stack(out.scores, 1).log_softmax(-1)  # (samples, steps, V)
        torch.special.entr(logprobs.exp()).sum(-1)
    tokens = out.sequences[:, len(ids) :]
    ended = (tokens == end).int().cumsum(1)
    return int((ended - (tokens == end).int() == 0).sum())


def ours(model: Any, ids: list[int], end: int, samples: int, steps: int, record: bool = True) -> int:
    from canopy_store.ingest import sample
    from canopy_store.ingest.policy import Policy

    if not record:  # the loop without its statistics: entropy and the chance of ending are not taken
        Policy.entropy = lambda self: self.logprobs[:, 0]  # type: ignore[method-assign]
        Policy.event_logprob = lambda self, member: self.logprobs[:, 0]  # type: ignore[method-assign]
    sampling = sample.Sampling(1.0, 100, 1.0, steps, (end,), 0, samples)
    job = sample.Job(ids, range(samples), lambda s: sample.uniforms("bench", 0, "p", s, steps))
    ((rollouts),) = sample.sample_prompts(model, [job], sampling)
    return sum(len(rollout.token_ids) for rollout in rollouts)


def one(what: str, path: str, prompt_tokens: int, samples: int, steps: int) -> dict[str, float]:
    model, ids, end = loaded(path, prompt_tokens)
    work = {"generate": generate, "canopy": ours,
            "canopy, no record": lambda *a: ours(*a, record=False)}[what]  # fmt: skip
    forget_peak()
    before = memory("VmRSS")
    began = time.perf_counter()
    tokens = work(model, ids, end, samples, steps)
    return {
        "rate": tokens / (time.perf_counter() - began),
        "memory": memory("VmHWM") - before,
        "tokens": tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--prompt-tokens", type=int, nargs="*", default=[110, 800])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        size = options.prompt_tokens[0]
        found = one(options.one, options.model, size, options.samples, options.new_tokens)
        print(json.dumps(found))
        return
    print(f"{machine()}; {options.samples} rollouts, {options.new_tokens} new tokens, top-k 100")
    print("| prompt tokens | | tokens/s | to generate | MB above the weights |")
    print("|---|---|---|---|---|")
    for size in options.prompt_tokens:
        base = 0.0
        for what in ("generate", "canopy", "canopy, no record"):
            command = [sys.executable, __file__, options.model, "--one", what, "--prompt-tokens",
                       str(size), "--samples", str(options.samples),
                       "--new-tokens", str(options.new_tokens)]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            base = base or found["rate"]
            print(f"| {size} | {what} | {found['rate']:.1f} | {found['rate'] / base:.1f} | "
                  f"{found['memory']:.0f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
