"""Batch jobs that write to a store. Only this folder imports torch or transformers.

jobs.py      what every job does alike: plan, shards, executors, progress, resuming, commit
rollouts.py  the ingest of rollouts; settings.py, what a run is asked to be
documents.py the ingest of documents; corpus.py, a file of them; scorer.py, who reads them
options.py   the ingest of options; items.py, a file of them; option_logprobs.py, how they are read
embed.py, reward.py, score.py, grade.py, graders.py   the jobs over stored rollouts
sources.py   a local folder, a GGUF file, a hub id or a package -> where it is, told without torch
models.py    what is there -> model, tokenizer
prompts.py   a JSONL, CSV or Parquet file -> prompts with their ids
rendering.py a prompt, and what stands before it -> token ids
draw.py      what is asked of an engine, and what it gives
policy.py    logits -> the distribution that is sampled, and its exact statistics
sample.py    one prompt -> many rollouts, with the per-step record
augment.py   training data that a model makes of other data; instructions.py, what it is told;
             candidates.py, what it answered and why not all is kept
finetune.py  a child model from a parent; training_data.py, the file it reads
"""
