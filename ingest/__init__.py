"""Batch jobs that write to a store. Only this folder imports torch or transformers.

jobs.py      what every job does alike: plan, shards, executors, progress, resuming, commit
rollouts.py  the ingest of rollouts; settings.py, what a run is asked to be
embed.py, reward.py, score.py, grade.py   the jobs over stored rollouts
models.py    a local folder, a GGUF file or a hub id -> model, tokenizer
prompts.py   a JSONL file -> prompts with their ids
policy.py    logits -> the distribution that is sampled, and its exact statistics
sample.py    one prompt -> many rollouts, with the per-step record
finetune.py  a child model from a parent
"""
