"""The memory that the sampler takes beside the memory foretold: python benchmarks/bench_memory.py

Each case is a small Llama with random weights in a process of its own (Linux). The width of a batch
follows from what is foretold: a ratio far above 1 would run out of memory, one far below wastes it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from bench_ingest import forget_peak, memory
from bench_query import machine

# whether rollouts share their prompt's keys and values, vocabulary, top-k, tokens of the prompt,
# rollouts side by side, new tokens
CASES = (
    (True, 60_000, 100, 64, 64, 8),
    (True, 60_000, 0, 64, 64, 8),
    (True, 500, 0, 64, 128, 180),
    (False, 500, 0, 500, 64, 20),
)


def measure(case: tuple[bool, int, int, int, int, int]) -> tuple[float, float]:
    """The peak above the weights and the foretold one, in MB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from canopy_store.ingest.draw import Job, Sampling, uniforms
    from canopy_store.ingest.sample import footprint, sample_prompts

    torch.set_num_threads(1)
    share, vocabulary, top_k, length, width, steps = case
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    )
    model = LlamaForCausalLM(config).eval()
    if not share:
        model.config.model_type = "another"  # of which it is not known that prompts can be shared

    def job(ids: list[int], samples: int) -> Job:
        return Job(ids, range(samples), lambda s: uniforms("m", 0, str(len(ids)), s, steps))

    sampling = Sampling(1.0, top_k, 1.0, steps, (), 0, width)
    sample_prompts(model, [job([1, 2], 2)], sampling)  # what is allocated once
    forget_peak()
    before = memory("VmRSS")
    sample_prompts(model, [job([1] * length, width)], sampling)
    fixed, slot = footprint(model, sampling, [length])
    return memory("VmHWM") - before, (fixed + width * slot) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        print(*measure(CASES[options.case]))
        return
    print(machine())
    print("| shared | vocabulary | top-k | prompt | width | new tokens | MB | foretold | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for number, (share, *numbers) in enumerate(CASES):
        command = [sys.executable, __file__, "--case", str(number)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        taken, foretold = map(float, done.stdout.split())
        cells = ["yes" if share else "no", *(f"{n:,}" for n in numbers)]
        cells += [f"{taken:.0f}", f"{foretold:.0f}", f"{taken / foretold:.2f}"]
        print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
