"""The one definition of every table; the columns that only views have are in sql/columns.py.

Arrow schemas, zero-row views, DuckDB comments and the data dictionary derive from both.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

FORMAT_VERSION = 2
# What a judge of a pair may say; entailment models the last three.
VERDICTS = ("similar", "different", "entailment", "neutral", "contradiction")
METADATA_KEY = b"canopy_schema"  # in every Parquet file: "<table>:<format version>"


def _list(kind: pa.DataType, size: int = -1) -> pa.DataType:
    return pa.list_(pa.field("element", kind), size)  # the name Parquet gives a list's content


_ARROW = {
    "VARCHAR": pa.string(),
    "VARCHAR[]": _list(pa.string()),
    "INTEGER": pa.int32(),
    "BIGINT": pa.int64(),
    "DOUBLE": pa.float64(),
    "BOOLEAN": pa.bool_(),
    "TIMESTAMP": pa.timestamp("us"),
    "INTEGER[]": _list(pa.int32()),
    "FLOAT[]": _list(pa.float32()),
    "DOUBLE[]": _list(pa.float64()),
    "INTEGER[][]": _list(_list(pa.int32())),
    "FLOAT[][]": _list(_list(pa.float32())),
}


@dataclass(frozen=True)
class Column:
    """A column: DuckDB type, what it means, unit ('' when it has none), the format that brought it.

    One that was ``added`` within format 2 may lack in a file, and is NULL then.
    """

    name: str
    type: str
    doc: str
    unit: str = ""
    required: bool = True
    since: int = 1
    added: bool = False


@dataclass(frozen=True)
class Table:
    """A table, and all that the rest of the package needs to know of it.

    Parameters
    ----------
    name, grain, keys, columns : what it is called, what one row is, its key, its own columns
    partitions : hive keys of the path (``family=…/``); all but ``run``, which is run_id, are columns too
    commit : keys of its commit record; none for tables whose files travel in records of other kinds
    brings : tables whose files its records name beside its own
    parent : the table whose removal removes it
    refers : tables of which each of its rows names a row, by their key
    checks : names of the checks of `canopy_store.upkeep.verify_rows` that its rows must pass
    split : float lists that are smaller byte-stream-split (figures: docs/performance.md)
    texts : columns that hold text, which an export may leave out: every measure stays computable
    plan : the kind of the plan that its job agrees on: run, embedder, …; None where it has no job
    """

    name: str
    grain: str
    keys: tuple[str, ...]
    columns: tuple[Column, ...]
    partitions: tuple[str, ...] = ()
    commit: tuple[str, ...] = ()
    brings: tuple[str, ...] = ()
    parent: str | None = None
    refers: tuple[str, ...] = ()
    checks: tuple[str, ...] = ()
    split: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    plan: str | None = None

    @property
    def path_columns(self) -> tuple[str, ...]:
        """The partition keys that are no columns of their own (``run`` stands in the file as run_id)."""
        own = {column.name for column in self.columns}
        return tuple(key for key in self.partitions if key != "run" and key not in own)


def _c(
    name: str,
    type: str,
    doc: str,
    unit: str = "",
    required: bool = True,
    since: int = 1,
    added: bool = False,
) -> Column:
    return Column(name, type, doc, unit, required, since, added)


_RUN_ID = _c("run_id", "VARCHAR", "The run: one ingest of (model, task, sampling policy).")
_PROMPT_ID = _c("prompt_id", "VARCHAR", "The prompt: a content hash, or the id an import gave.")
_SAMPLE = _c("sample", "INTEGER", "Number of the rollout among those of its prompt, from 0.")
_MODEL_ID = _c("model_id", "VARCHAR", "The checkpoint: family/variant.")
_FAMILY = _c("family", "VARCHAR", "Model family, held fixed in comparisons.")
_VARIANT = _c("variant", "VARCHAR", "Variant of the family: base, sft, instruct, …")
_TASK = _c("task", "VARCHAR", "Task the prompt belongs to: coding, math, …")
_DOCUMENT_ID = _c(
    "document_id", "VARCHAR", "The document: a content hash, or the id that its file gave."
)
_ITEM_ID = _c("item_id", "VARCHAR", "The item, a question with options: the id that its file gave.")
_OPTION = _c("option", "INTEGER", "Number of the option among those of its item, from 0.")
_LOGPROB = _c(
    "logprob",
    "FLOAT[]",
    "Per step, log π of the sampled token under the sampling policy.",
    "nats",
    False,
)
_SCORE_LOGPROB = _c(
    "logprob",
    "FLOAT[]",
    "Per step, log-probability of the rollout's token under the policy; -inf outside its support.",
    "nats",
    False,
)
_H = _c("entropy_sum", "DOUBLE", "H_i: sum of entropy over the rollout.", "nats")
_EOS_LOGPROB = _c(
    "eos_logprob",
    "FLOAT[]",
    "Per step, log of the policy's probability of ending the rollout; -inf where it cannot end.",
    "nats",
    False,
)
_SUMS = (
    _c("surprisal_sum", "DOUBLE", "Sum of -logprob over the rollout.", "nats", False),
    _c(
        "stop_entropy_sum",
        "DOUBLE",
        "Sum over steps of the binary entropy of ending against going on.",
        "nats",
        False,
    ),
)

TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        Table(
            "models",
            "one row per checkpoint",
            ("model_id",),
            (
                _MODEL_ID,
                _FAMILY,
                _VARIANT,
                _c("parent_id", "VARCHAR", "model_id this one was made from.", "", False),
                _c("treatment", "VARCHAR", "What was done to the parent: base, sft, lora, dpo, …"),
                _c("generation", "INTEGER", "Generations since the first ancestor; 0 for a base."),
                _c("seed", "BIGINT", "Seed of the treatment.", "", False),
                _c("hyperparameters", "VARCHAR", "Of the treatment, as JSON.", "", False),
                _c("data_sha256", "VARCHAR", "Hash of the treatment's data file.", "", False),
                _c("weights_sha256", "VARCHAR", "Hash of the weight files.", "", False),
                _c("tokenizer_sha256", "VARCHAR", "Hash of vocabulary and merges.", "", False),
                _c("source", "VARCHAR", "Folder name or hub id it was loaded from.", "", False),
                _c(
                    "series",
                    "VARCHAR",
                    "Of a checkpoint in a series along one training: the variant that it is a step of; "
                    "its own variant is series@step.",
                    "",
                    False,
                    2,
                    True,
                ),
                _c("step", "BIGINT", "Optimiser steps done by then.", "steps", False, 2, True),
                _c("tokens_seen", "BIGINT", "Tokens trained on by then.", "tokens", False, 2, True),
            ),
            ("family", "variant"),
            commit=("family", "variant"),
        ),
        Table(
            "training",
            "one row per step of a checkpoint's training, and per evaluation in it and its text",
            ("model_id", "step", "split"),
            (
                _MODEL_ID,
                _FAMILY,
                _VARIANT,
                _c("step", "INTEGER", "Optimiser steps done; 0: the parent.", "steps"),
                _c(
                    "split",
                    "VARCHAR",
                    "train, or the corpus that was read, with its split: news/test; of other trainers "
                    "eval, or eval_NAME.",
                ),
                _c("tokens", "BIGINT", "Tokens that the loss is over.", "tokens", False),
                _c("loss", "DOUBLE", "Mean -log-probability of these.", "nats per token", False),
                _c("penalty", "DOUBLE", "What the regulariser added to the loss.", "nats", False),
                _c("lr", "DOUBLE", "Learning rate of the step.", "", False),
                _c("grad_norm", "DOUBLE", "Norm of the gradient, before it is clipped.", "", False),
                _c("wall_s", "DOUBLE", "Since the training began.", "seconds", False),
            ),
            ("family", "variant"),
            commit=("family", "variant"),
            refers=("models",),
        ),
        Table(
            "datasets",
            "one row per data set that checkpoints are trained on",
            ("data_sha256",),
            (
                _c("data_sha256", "VARCHAR", "Hash of the data file."),
                _c("name", "VARCHAR", "Name of the data set."),
                _c("lines", "BIGINT", "Lines of the file."),
                _c(
                    "method",
                    "VARCHAR",
                    "How it came to be: given, local or global (augmented by a model from each line, or "
                    "from all), oracle (by rule), rollouts (of a run), mixed (with real lines).",
                ),
                _c("generator", "VARCHAR", "model_id of the model that wrote it.", "", False),
                _c(
                    "generation",
                    "INTEGER",
                    "Generations of models since text that no model wrote; 0: none wrote it.",
                    "",
                    False,
                ),
                _c("real", "DOUBLE", "Share of its lines that no model wrote.", "", False),
                _c(
                    "replayed",
                    "DOUBLE",
                    "Share of its lines that an ancestor was trained on.",
                    "",
                    False,
                ),
                _c("generated", "DOUBLE", "Share of its lines that a model wrote.", "", False),
                _c("source", "VARCHAR", "Where it came from.", "", False),
                _c("license", "VARCHAR", "Licence of the data.", "", False),
            ),
            ("data_sha256",),
            commit=("data_sha256",),
        ),
        Table(
            "prompts",
            "one row per prompt of a task",
            ("task", "prompt_id"),
            (
                _PROMPT_ID,
                _c("text", "VARCHAR", "The prompt as plain text.", "", False),
                _c("messages", "VARCHAR", "The prompt as chat messages, JSON.", "", False),
                _c("source", "VARCHAR", "Where the prompt came from.", "", False),
                _c("license", "VARCHAR", "Licence of the prompt.", "", False),
                _c("reference", "VARCHAR", "The right answer, for graders.", "", False, 2),
            ),
            ("task",),
            texts=("text", "messages", "reference"),
        ),
        Table(
            "runs",
            "one row per complete run",
            ("run_id",),
            (
                _RUN_ID,
                _MODEL_ID,
                _FAMILY,
                _VARIANT,
                _TASK,
                _c("rendering", "VARCHAR", "How prompts became tokens: chat, plain or import."),
                _c("temperature", "DOUBLE", "Sampling temperature; 0 is greedy.", "", False),
                _c("top_k", "INTEGER", "Tokens kept by top-k; 0 is off.", "tokens", False),
                _c("top_p", "DOUBLE", "Probability mass kept by top-p; 1 is off.", "", False),
                _c("max_new_tokens", "INTEGER", "Longest rollout allowed.", "tokens", False),
                _c("n_prompts", "BIGINT", "Prompts in the run."),
                _c("n_samples", "INTEGER", "Rollouts per prompt (the most, where it varies)."),
                _c("n_rollouts", "BIGINT", "Rollouts in the run."),
                _c("n_tokens", "BIGINT", "Generated tokens in the run.", "tokens"),
                _c("n_shards", "INTEGER", "Parquet files of the run's rollouts."),
                _c(
                    "logged",
                    "BOOLEAN",
                    "Whether every rollout came with logprob and entropy; where "
                    "false, views take what lacks from scores under the run's own model and policy.",
                ),
                _c("seed", "BIGINT", "Seed asked for.", "", False),
                _c("dtype", "VARCHAR", "Number format of the weights while sampling.", "", False),
                _c("device", "VARCHAR", "Device it ran on.", "", False),
                _c("engine", "VARCHAR", "What sampled: transformers, import, …"),
                _c("versions", "VARCHAR", "Versions that matter, as JSON.", "", False),
                _c("settings", "VARCHAR", "Every setting a resumed run must repeat, as JSON."),
                _c("started_at", "TIMESTAMP", "Start of the run's first ingest, UTC."),
                _c("finished_at", "TIMESTAMP", "When the run was completed, UTC."),
                _c(
                    "wall_s",
                    "DOUBLE",
                    "Time spent sampling: the sum of its shards' seconds in work.",
                    "seconds",
                    False,
                ),
                _c(
                    "energy_j",
                    "DOUBLE",
                    "Energy used: the sum of its shards' in work; NULL when not measured.",
                    "joules",
                    False,
                ),
                _c("energy_method", "VARCHAR", "How energy_j was measured.", "", False),
            ),
            ("run",),
        ),
        Table(
            "rollouts",
            "one row per rollout",
            ("run_id", "prompt_id", "sample"),
            (
                _RUN_ID,
                _PROMPT_ID,
                _SAMPLE,
                _c("text", "VARCHAR", "The generated text.", "", False),
                _c(
                    "token_ids",
                    "INTEGER[]",
                    "Generated token ids, the end-of-sequence token included when sampled.",
                    "",
                    False,
                ),
                _c("n_tokens", "INTEGER", "N: generated tokens, the end token included.", "tokens"),
                _c(
                    "finish_reason",
                    "VARCHAR",
                    "stop: ended by itself; length: cut at max_new_tokens.",
                    "",
                    False,
                ),
                _LOGPROB,
                _c(
                    "entropy",
                    "FLOAT[]",
                    "Per step, entropy of the sampling policy over its whole support; NULL where the "
                    "engine gave none (views then take that of scores).",
                    "nats",
                    False,
                ),
                _EOS_LOGPROB,
                _c("entropy_sum", "DOUBLE", "H_i: sum of entropy over the rollout.", "nats", False),
                *_SUMS,
                _c(
                    "top_token_ids",
                    "INTEGER[][]",
                    "Per step, ids of the likeliest tokens, in order; "
                    "a shortened list, of which no entropy may be taken.",
                    "",
                    False,
                ),
                _c(
                    "top_logprobs",
                    "FLOAT[][]",
                    "Per step, log π of top_token_ids; of the model or of "
                    "the server where the run's settings say so in top_logprobs_of.",
                    "nats",
                    False,
                ),
            ),
            ("family", "variant", "task", "run"),
            commit=("run",),
            brings=("runs", "prompts", "work"),
            checks=("rollouts", "steps"),
            split=("logprob", "entropy", "eos_logprob", "top_logprobs"),
            texts=("text", "token_ids", "top_token_ids"),
            plan="run",
        ),
        Table(
            "scores",
            "one row per rollout under another model or policy",
            ("run_id", "prompt_id", "sample", "scorer_id", "policy"),
            (
                _RUN_ID,
                _PROMPT_ID,
                _SAMPLE,
                _c("policy", "VARCHAR", "The policy scored under, as JSON: temperature, top_k, top_p."),
                _SCORE_LOGPROB,
                _c(
                    "entropy",
                    "FLOAT[]",
                    "Per step, entropy of the scorer's policy over its whole support.",
                    "nats",
                ),
                _EOS_LOGPROB,
                _H,
                *_SUMS,
            ),
            ("scorer_id", "run"),
            commit=("scorer_id", "policy", "run"),
            brings=("work",),
            parent="rollouts",
            checks=("scored_steps",),
            split=("logprob", "entropy", "eos_logprob"),
            plan="scorer",
        ),
        Table(
            "embeddings",
            "one row per rollout under an embedder",
            ("run_id", "prompt_id", "sample", "embedder"),
            (
                _RUN_ID,
                _PROMPT_ID,
                _SAMPLE,
                _c("embedding", "FLOAT[]", "Unit-length embedding of the rollout's text."),
            ),
            ("embedder", "run"),
            commit=("embedder", "run"),
            brings=("embedding_spectra", "work"),
            parent="rollouts",
            checks=("embeddings",),
            split=("embedding",),
            plan="embedder",
        ),
        Table(
            "embedding_spectra",
            "one row per prompt's rollouts under an embedder",
            ("run_id", "prompt_id", "embedder", "selection"),
            (
                _RUN_ID,
                _PROMPT_ID,
                _c("n", "INTEGER", "Rollouts in the subset."),
                _c("samples", "INTEGER[]", "Sample numbers of the subset."),
                _c(
                    "semantic_distances",
                    "DOUBLE[]",
                    "Per rollout of samples, 1 - mean cosine similarity to the others; NULL of one.",
                ),
                _c("embedding_sum", "DOUBLE[]", "Sum of the unit embeddings."),
                _c(
                    "eigenvalues",
                    "DOUBLE[]",
                    "Eigenvalues of the cosine kernel / n, largest first; they sum to 1.",
                ),
            ),
            ("embedder", "selection", "run"),
            commit=("embedder", "selection", "run"),
            parent="rollouts",
            checks=("spectra",),
            plan="embedder",
        ),
        Table(
            "selections",
            "one row per rollout of a named subset",
            ("run_id", "prompt_id", "sample", "selection"),
            (_RUN_ID, _PROMPT_ID, _SAMPLE),
            ("selection", "run"),
            commit=("selection", "run"),
            parent="rollouts",
            plan="selection",
        ),
        Table(
            "rewards",
            "one row per rollout under a reward model",
            ("run_id", "prompt_id", "sample", "reward_model"),
            (_RUN_ID, _PROMPT_ID, _SAMPLE, _c("reward", "DOUBLE", "The reward model's score.")),
            ("reward_model", "run"),
            commit=("reward_model", "run"),
            brings=("work",),
            parent="rollouts",
            checks=("rewards",),
            plan="reward_model",
        ),
        Table(
            "grades",
            "one row per rollout under a grader",
            ("run_id", "prompt_id", "sample", "grader"),
            (
                _RUN_ID,
                _PROMPT_ID,
                _SAMPLE,
                _c("answer", "VARCHAR", "The answer found in the rollout's text.", "", False),
                _c("correct", "BOOLEAN", "Whether the answer is right; NULL of none.", "", False),
                _c(
                    "score",
                    "DOUBLE",
                    "The grader's score; 1 is right and 0 wrong where it only tells these apart.",
                    "",
                    False,
                ),
            ),
            ("grader", "run"),
            commit=("grader", "run"),
            brings=("work",),
            parent="rollouts",
            checks=("grades",),
            texts=("answer",),
            plan="grader",
        ),
        Table(
            "scorers",
            "one row per scorer of documents or options",
            ("scorer_id",),
            (
                _MODEL_ID,
                _FAMILY,
                _VARIANT,
                _c(
                    "context_sha256",
                    "VARCHAR",
                    "Hash of the context that everything is read after; NULL: none.",
                    "",
                    False,
                ),
                _c(
                    "number_format",
                    "VARCHAR",
                    "Number format that is emulated; NULL: none, dtype computes.",
                    "",
                    False,
                ),
                _c("dtype", "VARCHAR", "Number format of the weights; NULL of an import.", "", False),
                _c(
                    "template",
                    "VARCHAR",
                    "How texts become tokens: plain or chat; NULL of an import.",
                    "",
                    False,
                ),
                _c(
                    "weights_sha256",
                    "VARCHAR",
                    "Hash of the weight files; NULL of an import.",
                    "",
                    False,
                ),
                _c(
                    "macs",
                    "BIGINT",
                    "Multiply-accumulates a token of the layers whose number format is emulated.",
                    "",
                    False,
                ),
            ),
            ("scorer_id",),
            commit=("scorer_id",),
            refers=("models",),
        ),
        Table(
            "documents",
            "one row per document of a corpus",
            ("corpus", "document_id"),
            (
                _DOCUMENT_ID,
                _c("text", "VARCHAR", "The document's text.", "", False),
                _c("split", "VARCHAR", "Part of the corpus: train, test, …; all where none is named."),
                _c(
                    "cluster",
                    "VARCHAR",
                    "What the document shares with others that stand or fall with it; its own id where "
                    "none is named.",
                ),
                _c("n_bytes", "BIGINT", "Bytes of the text as UTF-8.", "bytes"),
                _c("source", "VARCHAR", "Where the document came from.", "", False),
                _c("license", "VARCHAR", "Licence of the document.", "", False),
            ),
            ("corpus",),
            commit=("corpus",),
            texts=("text",),
        ),
        Table(
            "document_scores",
            "one row per document under a scorer",
            ("corpus", "document_id", "scorer_id"),
            (
                _DOCUMENT_ID,
                _c(
                    "token_ids",
                    "INTEGER[]",
                    "Token ids of the whole text, without what stands before it.",
                    "",
                    False,
                ),
                _c(
                    "tokens",
                    "VARCHAR[]",
                    "The text that each of token_ids stands for: end to end, the document's text.",
                    "",
                    False,
                ),
                _c(
                    "logprob",
                    "FLOAT[]",
                    "Log-probability of each scored token, the last n_tokens of token_ids, given all "
                    "before it in its window.",
                    "nats",
                ),
                _c(
                    "entropy",
                    "FLOAT[]",
                    "Entropy of the distribution that each scored token was expected from.",
                    "nats",
                ),
                _c(
                    "n_tokens",
                    "INTEGER",
                    "Scored tokens: all, or all but the first where no token stands before the text.",
                    "tokens",
                ),
                _c("n_bytes", "BIGINT", "Bytes of the text of the scored tokens.", "bytes"),
                _c("logprob_sum", "DOUBLE", "Sum of logprob.", "nats"),
                _c("entropy_sum", "DOUBLE", "Sum of entropy.", "nats"),
                _c(
                    "kl_sum",
                    "DOUBLE",
                    "Sum over scored tokens of the KL of the scorer's number format from the plain "
                    "model, given the same tokens before; NULL: no number format.",
                    "nats",
                    False,
                ),
            ),
            ("scorer_id", "corpus"),
            commit=("scorer_id", "corpus"),
            brings=("work",),
            parent="documents",
            refers=("scorers",),
            checks=("document_scores",),
            split=("logprob", "entropy"),
            texts=("token_ids", "tokens"),
            plan="document_scorer",
        ),
        Table(
            "items",
            "one row per option of an item",
            ("task", "item_id", "option"),
            (
                _ITEM_ID,
                _OPTION,
                _c("prompt", "VARCHAR", "What stands before the option, as plain text.", "", False),
                _c("messages", "VARCHAR", "The same as chat messages, JSON.", "", False),
                _c(
                    "text",
                    "VARCHAR",
                    "The option as it is scored, a space before it included.",
                    "",
                    False,
                ),
                _c(
                    "n_chars",
                    "INTEGER",
                    "Characters of the text, less one space at its beginning.",
                    "characters",
                ),
                _c("correct", "BOOLEAN", "Whether this option is the right one; one of an item is."),
                _c(
                    "split",
                    "VARCHAR",
                    "Part of the task: forward, reversal, …; all where none is named.",
                ),
                _c(
                    "cluster",
                    "VARCHAR",
                    "What the item shares with others that stand or fall with it, as a fact; its own id "
                    "where none is named.",
                ),
                _c("source", "VARCHAR", "Where the item came from.", "", False),
                _c("license", "VARCHAR", "Licence of the item.", "", False),
            ),
            ("task",),
            commit=("task",),
            checks=("items",),
            texts=("prompt", "messages", "text"),
        ),
        Table(
            "option_scores",
            "one row per option under a scorer",
            ("task", "item_id", "option", "scorer_id"),
            (
                _ITEM_ID,
                _OPTION,
                _c(
                    "n_tokens",
                    "INTEGER",
                    "Tokens of the option; NULL where an import does not tell.",
                    "tokens",
                    False,
                ),
                _c(
                    "logprob",
                    "FLOAT[]",
                    "Log-probability of each of the option's tokens, given context, prompt and those "
                    "before; NULL where an import tells the sum alone.",
                    "nats",
                    False,
                ),
                _c("logprob_sum", "DOUBLE", "Log-probability of the option: sum of logprob.", "nats"),
                _c(
                    "neutral_sum",
                    "DOUBLE",
                    "The same after the neutral prompt, not the item's; NULL where none is given.",
                    "nats",
                    False,
                ),
            ),
            ("scorer_id", "task"),
            commit=("scorer_id", "task"),
            brings=("work",),
            parent="items",
            refers=("scorers",),
            checks=("option_scores",),
            split=("logprob",),
            plan="option_scorer",
        ),
        Table(
            "work",
            "one row per shard of a job",
            ("run_id", "kind", "name", "shard"),
            (
                _c("run_id", "VARCHAR", "The run, or what else the job was over: a task, a corpus."),
                _c("shard", "INTEGER", "Number of the shard when the job wrote it."),
                _c("rows", "BIGINT", "Rows that the job made."),
                _c("tokens", "BIGINT", "Tokens sampled or read.", "tokens", False),
                _c("seconds", "DOUBLE", "Wall-clock time of the shard.", "seconds", False),
                _c("energy_j", "DOUBLE", "Energy used; NULL when not measured.", "joules", False),
                _c("energy_method", "VARCHAR", "How energy_j was measured.", "", False),
                _c("device", "VARCHAR", "Device it ran on.", "", False),
                _c("host", "VARCHAR", "Machine it ran on.", "", False),
            ),
            ("kind", "name", "run"),
        ),
        Table(
            "judgments",
            "one row per ordered pair of a prompt's rollouts that a judge was asked about",
            ("run_id", "prompt_id", "sample", "other_sample", "judge"),
            (
                _RUN_ID,
                _PROMPT_ID,
                _SAMPLE,
                _c(
                    "other_sample",
                    "INTEGER",
                    "The rollout that sample is held against: of two verdicts of a pair each has one "
                    "direction.",
                ),
                _c(
                    "verdict",
                    "VARCHAR",
                    "similar or different; of an entailment model entailment, neutral or contradiction: "
                    "what follows for other_sample from sample. NULL of a failed call.",
                    "",
                    False,
                ),
                _c(
                    "probability",
                    "DOUBLE",
                    "The judge's probability of the verdict; NULL where it tells none.",
                    "",
                    False,
                ),
                _c("reply", "VARCHAR", "What the judge answered, where it answers in text.", "", False),
                _c("status", "VARCHAR", "ok, or failed: a reply in which no verdict was found."),
            ),
            ("judge", "run"),
            commit=("judge", "run"),
            brings=("work",),
            parent="rollouts",
            checks=("judgments",),
            texts=("reply",),
            plan="judge",
        ),
        Table(
            "clusters",
            "one row per judged rollout under a clustering by meaning",
            ("run_id", "prompt_id", "sample", "clustering"),
            (
                _RUN_ID,
                _PROMPT_ID,
                _SAMPLE,
                _c(
                    "cluster",
                    "INTEGER",
                    "Number of the rollout's cluster among those of its prompt, from 0, in the order of "
                    "their first members.",
                ),
                _c(
                    "n_unlike",
                    "INTEGER",
                    "Other rollouts of its cluster that it was not judged alike with: above 0 where "
                    "likeness is not transitive.",
                ),
            ),
            ("clustering", "run"),
            commit=("clustering", "run"),
            brings=("work",),
            parent="rollouts",
            checks=("clusters",),
            plan="clustering",
        ),
    )
}

_PATH_DOCS = (
    _FAMILY,
    _VARIANT,
    _TASK,
    _c("embedder", "VARCHAR", "Embedding model; 'none' in views where nothing is embedded."),
    _c("selection", "VARCHAR", "Named subset of the rollouts; 'all' is every one."),
    _c("reward_model", "VARCHAR", "Reward model."),
    _c("scorer_id", "VARCHAR", "The scorer: a model, of documents and options as scorers describes it."),
    _c("grader", "VARCHAR", "Grader."),
    _c("corpus", "VARCHAR", "Corpus: a set of documents, read once and never changed."),
    _c("judge", "VARCHAR", "What judged whether two rollouts mean the same."),
    _c(
        "clustering",
        "VARCHAR",
        "Clusters by meaning: names of judge and method, as in nli.strict.",
    ),
    _c("kind", "VARCHAR", "Kind of job: the table that it fills."),
    _c("name", "VARCHAR", "Name of the job: its embedder, scorer, …; of rollouts, their run."),
)

# The tables that others refer to, in the order in which they need to be there: what jobs were done with.
REGISTERS = tuple(name for name in TABLES if any(name in table.refers for table in TABLES.values()))

# Keys and path columns, by name: they mean the same in every table and view. Not so a split: it is of a
# training's texts, of a corpus or of a task.
COLUMNS: dict[str, Column] = {}
for _column in (
    *(c for t in TABLES.values() for c in t.columns if c.name in t.keys and c.name != "split"),
    *_PATH_DOCS,
):
    COLUMNS.setdefault(_column.name, _column)


def arrow_schema(
    table: str, embedding_dim: int | None = None, version: int = FORMAT_VERSION
) -> pa.Schema:
    """The Arrow schema of a table's files; ``embedding_dim`` fixes the size of that list."""
    fields = []
    for column in file_columns(table, version):
        kind = _ARROW[column.type]
        if column.name == "embedding" and embedding_dim is not None:
            kind = _list(pa.float32(), embedding_dim)
        fields.append(pa.field(column.name, kind, nullable=not column.required))
    return pa.schema(fields, metadata={METADATA_KEY: f"{table}:{version}".encode()})


def file_columns(table: str, version: int = FORMAT_VERSION) -> list[Column]:
    """The columns of a table's files; in format 1 those of the path stood in the path alone."""
    if version == 1:
        return [column for column in TABLES[table].columns if column.since == 1]
    return view_columns(table)


def added_columns(table: str) -> list[str]:
    """The names of a table's columns that a file of format 2 may lack."""
    return [column.name for column in TABLES[table].columns if column.added]


def view_columns(table: str) -> list[Column]:
    """The columns of a table's view: path partitions first, then its own."""
    return [COLUMNS[key] for key in TABLES[table].path_columns] + list(TABLES[table].columns)
