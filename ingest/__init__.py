"""Batch jobs that write to a store. Only this folder imports torch or transformers.

models.py    a local folder, a GGUF file or a hub id -> model, tokenizer
prompts.py   a JSONL file -> prompts with their ids
policy.py    logits -> the distribution that is sampled, and its exact statistics
sample.py    one prompt -> many rollouts, with the per-step record
rollouts.py  the ingest of rollouts: shards, resuming, the run's row
embed.py     the ingest of embeddings
finetune.py  a child model from a parent
"""
