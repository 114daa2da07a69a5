"""The callback in real trainings of a tiny model: what it stores, and that it changes nothing."""

from __future__ import annotations

import contextlib
import json
import random

import numpy as np
import polars as pl
import pytest
import torch
from stores import write_prompts
from tiny import TEXTS, save_tiny
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from canopy_store import sql, store
from canopy_store.errors import CanopyError, ConflictError, DataError, UsageError
from canopy_store.ingest import callback as of_callback
from canopy_store.ingest.callback import CanopyCallback, undisturbed

OF = {"family": "tiny", "variant": "sft", "task": "walk", "samples": 3, "max_new_tokens": 5}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama with dropout: its training draws random numbers at every step."""
    folder = save_tiny(tmp_path_factory.mktemp("tiny"), 0)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.3}))
    return folder


@pytest.fixture
def watch(tmp_path):
    """A callback into the store S, every third step."""
    prompts = write_prompts(tmp_path / "prompts.jsonl", *list(TEXTS)[:2])
    return lambda **more: CanopyCallback(tmp_path / "S", prompts, **{"every": 3, **OF, **more})


def train(folder, out, *callbacks, resume=None, **more):
    """A trainer after its training: seven steps, shuffled, its loss logged at each."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = []
    for text in [*TEXTS.values()] * 3:
        ids = tokenizer(text)["input_ids"][:12]
        ids += [1] * (12 - len(ids))
        data.append({"input_ids": ids, "labels": ids})
    arguments = {
        "max_steps": 7,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        **more,
    }
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=TrainingArguments(output_dir=str(out), **arguments),
        train_dataset=data,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return [(e["step"], e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e]


def same_weights(one, other):
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_training_is_the_same_to_the_bit_and_its_steps_are_stored(model, watch, tmp_path):
    plain = train(model, tmp_path / "plain")
    watched = train(model, tmp_path / "watched", watch(), include_num_input_tokens_seen=True)
    assert len(losses(plain)) == 7
    assert losses(watched) == losses(plain)
    assert same_weights(watched, plain)
    assert all(module.training for module in watched.model.modules())
    rows = sql.read(tmp_path / "S", "models").sort("step")
    assert rows["step"].to_list() == [0, 3, 6, 7]
    assert rows["variant"].to_list() == ["sft@0", "sft@3", "sft@6", "sft@7"]
    assert rows["tokens_seen"].to_list() == [None, 72, 132, 156]  # 12 of a text, 9 texts in batches of 2
    assert set(rows["series"]) == {"sft"}
    assert set(rows["parent_id"]) == {"tiny/base"}
    metrics = sql.read(tmp_path / "S", "model_metrics")
    assert metrics["n_rollouts"].to_list() == [6] * 4
    assert metrics["ce_star"].n_unique() == 4
    # what it stores is what an ingest of the saved model gives
    from canopy_store.ingest.rollouts import ingest_rollouts

    watched.save_model(tmp_path / "saved")
    ingest_rollouts(
        tmp_path / "T",
        str(tmp_path / "saved"),
        prompts=tmp_path / "prompts.jsonl",
        device="cpu",
        **{**OF, "variant": "sft@7"},
    )
    of = ["prompt_id", "sample", "token_ids", "logprob", "entropy", "eos_logprob"]
    stored, again = (
        sql.read(tmp_path / name, "rollouts").filter(variant="sft@7").sort(of[:2]).select(of)
        for name in "ST"
    )
    assert stored.equals(again)


def test_a_training_that_goes_on_adds_its_further_steps(model, watch, tmp_path):
    train(model, tmp_path / "out", watch(), max_steps=4, save_strategy="steps", save_steps=4)
    before = sql.read(tmp_path / "S", "runs").select("run_id", "finished_at")
    with pytest.raises(ConflictError, match="steps of a training already, up to 4; give another"):
        train(model, tmp_path / "again", watch())
    # a step that was begun and not completed is sampled anew
    root = store.require(tmp_path / "S")
    record = store.record(root, "rollouts", run="tiny.sft@4.walk")
    store.remove_record(root, record)
    train(model, tmp_path / "out", watch(), resume=str(tmp_path / "out" / "checkpoint-4"))
    after = sql.read(tmp_path / "S", "runs").select("run_id", "finished_at")
    assert after["run_id"].str.extract(r"@(\d)").sort().to_list() == ["0", "3", "4", "6", "7"]
    kept = before.filter(pl.col("run_id") != "tiny.sft@4.walk")
    assert len(kept.join(after, on=["run_id", "finished_at"], how="semi")) == 2


def test_what_is_wrong_is_told_before_the_first_step(model, watch, tmp_path):
    for more, error, said in (
        ({"every": 0}, UsageError, "every 0"),
        ({"sampels": 3}, UsageError, "did you mean samples"),
        ({"temperature": -1}, UsageError, "--temperature -1"),
        ({"variant": ""}, UsageError, "variant ''"),
    ):
        with pytest.raises(error, match=said):
            watch(**more)
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"bad.jsonl: line 1"):
        CanopyCallback(tmp_path / "S", tmp_path / "bad.jsonl", every=1, **OF)
    with pytest.raises(CanopyError, match="window"):
        train(model, tmp_path / "out", watch(max_new_tokens=1000))


def test_what_fails_later_leaves_the_step_out_and_trains_on(model, watch, tmp_path, monkeypatch):
    plain = train(model, tmp_path / "plain", learning_rate=1e-2)
    sample, calls = of_callback.run_job, []

    def fails_once(*given):
        calls.append(given)
        if len(calls) == 2:
            torch.rand(3), np.random.rand(3), random.random()
            raise DataError("logits are NaN")
        return sample(*given)

    warned = []
    monkeypatch.setattr(of_callback, "run_job", fails_once)
    monkeypatch.setattr(of_callback.log, "warning", warned.append)
    watched = train(model, tmp_path / "out", watch())
    assert warned == ["canopy: step 3 is left out: logits are NaN"]
    assert losses(watched) == losses(plain)
    assert sql.read(tmp_path / "S", "models")["step"].sort().to_list() == [0, 6, 7]


def test_undisturbed_puts_everything_back(model):
    llama = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").train()
    llama.model.layers[0].eval()  # a frozen part
    modes = [module.training for module in llama.modules()]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with contextlib.suppress(KeyError), undisturbed(llama):
        assert not any(module.training for module in llama.modules())
        random.random(), np.random.rand(), torch.rand(1)
        llama.set_attn_implementation("sdpa")
        raise KeyError
    assert [module.training for module in llama.modules()] == modes
    assert llama.config._attn_implementation == "eager"
    assert states == (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    )


def test_grpo_trains_the_same_with_it(model, watch, tmp_path):
    """TRL's trainer samples too: by generate, from torch's random numbers."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    found = []
    for callbacks in ([], [watch(variant="grpo", every=2)]):
        trainer = trl.GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model),
            reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
            args=trl.GRPOConfig(
                output_dir=str(tmp_path / "grpo"),
                max_steps=4,
                per_device_train_batch_size=4,
                num_generations=4,
                max_completion_length=6,
                learning_rate=1e-2,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                seed=3,
            ),
            train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in [*TEXTS] * 4]),
            processing_class=AutoTokenizer.from_pretrained(model, pad_token="</s>"),
            callbacks=callbacks,
        )
        trainer.train()
        keys = ("loss", "reward", "entropy", "grad_norm")
        found.append([[e[k] for k in keys] for e in trainer.state.log_history if "reward" in e])
    assert len(found[0]) == 4
    assert found[0] == found[1]
    assert sql.read(tmp_path / "S", "models")["variant"].sort().to_list() == [
        "grpo@0",
        "grpo@2",
        "grpo@4",
    ]
