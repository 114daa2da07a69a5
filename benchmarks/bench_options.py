"""Options of many items after one context, beside a pass an option: python benchmarks/bench_options.py

    --model MODEL     a folder, a GGUF file or package:NAME; by default a random Llama made on the spot
    --items 40 --context-tokens 1500 --reference-items 2 --repeat 3

The reference reads context, prompt and option together, one sequence after the other, as a plain script
does. It takes so long that it is measured on a few of the items: each costs the same. Both sides run in
turn in one process, each counted in seconds an item; medians.

--cpu-time counts the seconds of this process: for a machine where other work runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from bench_query import machine

from canopy_store.ingest.option_logprobs import OptionReader, Question, held_by


def questions(items: int, context_tokens: int, vocabulary: int) -> list[Question]:
    """Items of 4 options after one context: prompts of 20 to 40 tokens, options of 1 to 8."""
    rng = np.random.default_rng(0)

    def some(n: int) -> list[int]:
        return [int(i) for i in rng.integers(3, vocabulary, n)]

    context = some(context_tokens)
    made = []
    for _ in range(items):
        stem = context + some(int(rng.integers(20, 41)))
        options = [some(int(rng.integers(1, 9))) for _ in range(4)]
        made.append(Question([stem + option for option in options], [len(stem)] * 4))
    return made


@torch.inference_mode()
def one_by_one(model: Any, asked: list[Question]) -> list[float]:
    sums = []
    for question in asked:
        for ids, start in zip(question.sequences, question.starts, strict=True):
            logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
            logprobs = logits[0, start - 1 : -1].float().log_softmax(-1)
            targets = torch.tensor(ids[start:], device=model.device)[:, None]
            sums.append(float(logprobs.gather(1, targets).sum()))
    return sums


def shared(model: Any, asked: list[Question], batch_tokens: int) -> list[float]:
    reader = OptionReader(model, held_by(asked), batch_tokens)
    found = reader.logprobs(asked, ["item"] * len(asked))
    if not reader.shares:
        raise SystemExit("this model reads whole sequences")
    return [float(row.sum()) for question in found for row in question]


def tiny() -> Any:
    """A random Llama of 10 million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=4096,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--context-tokens", type=int, default=1500)
    parser.add_argument("--reference-items", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true")
    given = parser.parse_args()
    if given.model:
        from canopy_store.ingest.models import load_model

        model = load_model(given.model, given.device, given.dtype)[0]
    else:
        model = tiny().to(given.device)
    clock = time.process_time if given.cpu_time else time.perf_counter

    def timed(work: Callable[[], list[float]]) -> tuple[float, list[float]]:
        started = clock()
        found = work()
        return clock() - started, found

    asked = questions(given.items, given.context_tokens, model.config.vocab_size)
    few = asked[: given.reference_items]
    ours, theirs = [], []
    for _ in range(given.repeat):
        seconds, sums = timed(lambda: shared(model, asked, given.batch_tokens))
        ours.append(seconds / len(asked))
        seconds, expected = timed(lambda: one_by_one(model, few))
        theirs.append(seconds / len(few))
    off = np.abs(np.array(sums[: len(expected)]) - expected).max()
    a, b = statistics.median(ours), statistics.median(theirs)
    print(machine())
    print(f"{given.items} items x 4 options after {given.context_tokens} tokens, {given.repeat} times")
    print(f"  one forward pass an option  {b * 1e3:10.1f} ms an item  {spread(theirs)}")
    print(f"  context and prompts once    {a * 1e3:10.1f} ms an item  {spread(ours)}")
    print(f"  {b / a:.1f} times faster; largest difference of a sum {off:.2g} nats")


def spread(values: list[float]) -> str:
    return f"({min(values) * 1e3:.1f} to {max(values) * 1e3:.1f})"


if __name__ == "__main__":
    main()
