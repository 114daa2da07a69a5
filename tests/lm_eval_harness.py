"""lm-evaluation-harness for real beside this package: `make test-lm-eval`.

Pytest collects no file of this name by itself. LM_EVAL names the harness's command, in an environment of
its own. It asks a local model a local multiple-choice task and logs its samples. What `canopy import`
makes of the log must choose as often right as the harness says, and `canopy ingest options` must give
the same options under the same model what the harness gave them.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from chain import CHAIN_LOGITS, STATES

import canopy_store

sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))

HARNESS = os.environ.get("LM_EVAL", "lm_eval")
# Of `hf` as it stands; fewshot examples are the first of another file, an empty line between them.
TASK = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: "FOLDER/test.jsonl", train: "FOLDER/train.jsonl"}}
test_split: test
fewshot_split: train
fewshot_config: {sampler: first_n}
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
METRICS
"""
ACCURACIES = {"acc": "accuracy_sum", "acc_norm": "accuracy_char", "acc_mutual_info": "accuracy_pmi"}

# acc_mutual_info asks each option after nothing but the first token, which the chain has none of.
MEASURED = {"chain": ["acc", "acc_norm"], "smollm2": list(ACCURACIES)}


def walks(number: int) -> list[dict[str, Any]]:
    """Questions of the chain: a walk, and what may follow, of one to three states.

    Every walk is as long: where one request's context is another's with a part of its option, version
    0.4.13 gives one of them the log-probabilities of the other's tokens.
    """
    rng = random.Random(0)
    found = []
    for _ in range(number):
        choices = {" ".join(rng.choices("abcdefg", k=rng.randint(1, 3))): None for _ in range(9)}
        prompt = " ".join(rng.choices("abcdefg", k=5))
        found.append({"prompt": prompt, "choices": list(choices)[:4], "answer": rng.randrange(4)})
    return found


def sentences(number: int) -> list[dict[str, Any]]:
    """Questions of Python's own help: how a sentence goes on, for one to four words."""
    rng = random.Random(0)
    text = re.sub(r"\s+", " ", " ".join(topics[name] for name in sorted(topics)))
    whole = dict.fromkeys(re.findall(r"(?<=\. )[A-Z][a-z ,]{40,160}\.", text))
    halves = []
    for words in (sentence.split() for sentence in whole):
        middle = len(words) // 2
        halves.append((" ".join(words[:middle]), " ".join(words[middle:][: rng.randint(1, 4)])))
    ends = list(dict.fromkeys(end for _, end in halves))
    found = []
    for prompt, end in halves[:number]:
        choices = [end, *rng.sample([other for other in ends if other != end], 3)]
        rng.shuffle(choices)
        found.append({"prompt": prompt, "choices": choices, "answer": choices.index(end)})
    assert len(found) == number
    return found


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct, from its package."""
    from demo_real import save_base

    save_base(folder := tmp_path_factory.mktemp("smollm2") / "base")
    return folder


def evaluate(folder: Path, model: Path, name: str, items: list[dict], shots: int) -> tuple[dict, Path]:
    """The harness's results of a task of these items, the first two its examples; the log of samples."""
    tasks = folder / "task"
    tasks.mkdir()
    for split, rows in (("train", items[:2]), ("test", items[2:])):
        (tasks / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = MEASURED[name]
    listed = "\n".join(
        f"  - {{metric: {metric}, aggregation: mean, higher_is_better: true}}" for metric in metrics
    )
    text = TASK.replace("NAME", name).replace("FOLDER", str(tasks)).replace("METRICS", listed)
    (tasks / f"{name}.yaml").write_text(text)
    line = [HARNESS, "run", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32"]
    line += ["--tasks", name, "--include_path", tasks, "--device", "cpu", "--batch_size", 8]
    line += ["--output_path", folder / "out", "--log_samples", "--num_fewshot", shots]
    offline = {name: "1" for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")}
    env = {**os.environ, **offline, "HF_HOME": str(folder / "home")}
    env.pop("PYTHONPATH", None)  # the harness is to see its own environment alone
    done = subprocess.run(list(map(str, line)), env=env, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (folder / "out").rglob("results_*.json")
    (samples,) = (folder / "out").rglob("samples_*.jsonl")
    return json.loads(results.read_text()), samples


@pytest.mark.parametrize(
    ("which", "shots"),
    [("chain", 0), ("chain", 2), ("smollm2", 0), ("smollm2", 2)],
)
def test_its_accuracy_is_ours_and_so_is_every_log_probability(
    tmp_path, canopy, request, which: str, shots: int
):
    model = request.getfixturevalue(which)
    items = walks(62) if which == "chain" else sentences(32)
    results, samples = evaluate(tmp_path, model, which, items, shots)
    print(f"lm_eval {results['lm_eval_version']}, transformers {results['transformers_version']}")
    root = tmp_path / "S"
    named = ("--store", root, "--family", "f")
    code, out, err = canopy("import", samples, *named, "--variant", "harness")
    assert (code, err) == (0, "")

    ours = canopy_store.read(root, "option_accuracy").row(0, named=True)
    assert ours["n_items"] == len(items) - 2
    told = {name.removesuffix(",none"): value for name, value in results["results"][which].items()}
    measured = {name: ACCURACIES[name] for name in MEASURED[which]}
    for name, column in measured.items():
        assert ours[column] == pytest.approx(told[name], abs=1e-12), name
        assert f"{name} {told[name]:.4f} in the log" in out
    assert len({told[name] for name in measured}) > 1  # else one could stand for another

    more: list[object] = ["--neutral", ""] if which == "smollm2" else []
    if shots == 0:  # items written apart from the log: other ones than were imported would be refused
        rows = [
            {
                "item_id": str(number),
                "prompt": item["prompt"],
                "options": [f" {choice}" for choice in item["choices"]],
                "answer": item["answer"],
            }
            for number, item in enumerate(items[2:])
        ]
        (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        more += ["--items", tmp_path / "items.jsonl"]
    line = ("ingest", "options", *named, "--variant", "ours", "--model", model, "--task", which)
    code, out, err = canopy(*line, "--device", "cpu", "--dtype", "float32", "--template", "plain", *more)
    assert code == 0, err

    scores = canopy_store.read(root, "option_scores").sort("item_id", "option")
    theirs, mine = (scores.filter(scorer_id=f"f.{variant}") for variant in ("harness", "ours"))
    assert len(mine) == len(theirs) == sum(len(item["choices"]) for item in items[2:])
    columns = ["logprob_sum", "neutral_sum"] if which == "smollm2" else ["logprob_sum"]
    for column in columns:
        off = np.abs(theirs[column].to_numpy() - mine[column].to_numpy())
        print(f"{which}, {shots} examples, {column}: {len(off)} options, off by {off.max():.1g} at most")
        assert off.max() < 1e-4
    accuracy = canopy_store.read(root, "option_accuracy").filter(scorer_id="f.ours").row(0, named=True)
    for name, column in measured.items():
        assert accuracy[column] == pytest.approx(told[name], abs=1e-12), name
    if which == "chain":  # and both are what the chain says
        logp = CHAIN_LOGITS - np.log(np.exp(CHAIN_LOGITS).sum(1, keepdims=True))
        for number, item in enumerate(items[2:]):
            of_item = theirs.filter(item_id=str(number))["logprob_sum"].to_list()
            for choice, value in zip(item["choices"], of_item, strict=True):
                states = [STATES.index(s) for s in (item["prompt"][-1], *choice.split())]
                expected = sum(logp[a, b] for a, b in itertools.pairwise(states))
                assert value == pytest.approx(expected, abs=1e-4)
