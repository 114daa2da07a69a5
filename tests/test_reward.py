"""Rewards from a model whose reward is known: it depends on the last token alone."""

from __future__ import annotations

import pytest
import torch
from chain import STATES, WORTH, save_reward_model
from safetensors.torch import load_file, save_file
from stores import write_prompts
from transformers import LlamaForSequenceClassification

import canopy_store


@pytest.fixture(scope="module")
def reward_model(chain, tmp_path_factory):
    """The folder of that model."""
    return save_reward_model(chain, tmp_path_factory.mktemp("worth"))


@pytest.fixture
def sampled(tmp_path, chain, canopy):
    prompts = write_prompts(tmp_path / "p.jsonl", "a b", "g", "c d e")
    code, _, err = canopy(
        "ingest",
        "rollouts",
        "--store",
        tmp_path / "s",
        "--model",
        chain,
        "--family",
        "f",
        "--variant",
        "base",
        "--task",
        "t",
        "--prompts",
        prompts,
        "--samples",
        6,
        "--max-new-tokens",
        9,
        "--prompts-per-shard",
        1,
        "--device",
        "cpu",
    )
    assert code == 0, err
    return tmp_path / "s"


def scored(canopy, root, model, *more):
    return canopy("ingest", "reward", "--store", root, "--reward-model", model, "--device", "cpu", *more)


def test_every_reward_is_the_one_known_and_the_best_are_selected(sampled, reward_model, canopy):
    code, out, err = scored(canopy, sampled, reward_model, "--name", "worth", "--batch-size", 4)
    assert (code, err) == (0, "")
    assert "rewards as worth" in out
    con = canopy_store.open(sampled)
    rows = con.sql(
        "select p.text as prompt, r.text, w.reward, w.reward_model, prompt_id, sample "
        "from rewards w join rollouts r using (run_id, prompt_id, sample) "
        "join prompts p using (prompt_id)"
    ).fetchall()
    assert len(rows) == 18
    for prompt, text, reward, name, _, _ in rows:
        last = (prompt + " " + text).split()[-1]
        assert reward == pytest.approx(WORTH[STATES.index(last)], abs=1e-5)
        assert name == "worth"
    assert canopy("select", "reward", "--store", sampled, "--keep", 0.5)[0] == 0
    kept = canopy_store.read(sampled, "selections")
    for prompt_id in kept["prompt_id"].unique():
        rewards = sorted((r[2] for r in rows if r[4] == prompt_id), reverse=True)
        mine = kept.filter(prompt_id=prompt_id)["sample"].to_list()
        chosen = sorted((r[2] for r in rows if r[4] == prompt_id and r[5] in mine), reverse=True)
        assert chosen == rewards[:3]


def test_it_resumes_and_refuses_another_model_of_the_same_name(sampled, reward_model, tmp_path, canopy):
    assert scored(canopy, sampled, reward_model, "--name", "worth")[0] == 0
    files = sorted((sampled / "rewards").rglob("*.parquet"))
    assert len(files) == 3
    before = [file.read_bytes() for file in files]
    files[1].unlink()
    assert scored(canopy, sampled, reward_model, "--name", "worth")[0] == 0
    assert [file.read_bytes() for file in files] == before
    other = tmp_path / "other"
    model = LlamaForSequenceClassification.from_pretrained(reward_model, dtype=torch.float32)
    with torch.no_grad():
        model.score.weight.mul_(2)
    model.save_pretrained(other)
    for file in reward_model.glob("tokenizer*"):
        (other / file.name).write_bytes(file.read_bytes())
    code, _, err = scored(canopy, sampled, other, "--name", "worth")
    assert (code, "weights_sha256 (stored" in err) == (1, True)


def test_what_is_refused(sampled, reward_model, chain, tmp_path, canopy):
    code, _, err = scored(canopy, sampled, chain)
    assert (code, err.count("\n")) == (1, 1)
    assert "not a reward model: no weights for score.weight" in err
    code, _, err = scored(canopy, sampled, reward_model, "--run", "nobody")
    assert (code, "no complete run" in err) == (1, True)
    code, _, err = scored(canopy, sampled, reward_model, "--label", 1)
    assert (code, "needs 0 to 0" in err) == (2, True)
    nan = tmp_path / "nan"
    nan.mkdir()
    for file in reward_model.iterdir():
        (nan / file.name).write_bytes(file.read_bytes())
    weights = load_file(nan / "model.safetensors")
    weights["score.weight"][:] = torch.nan
    save_file(weights, nan / "model.safetensors", metadata={"format": "pt"})
    code, _, err = scored(canopy, sampled, nan)
    assert (code, "NaN or infinite" in err) == (1, True)
    assert not (sampled / "rewards").exists()
