"""Treatments of a checkpoint: what keeps it near its parent, what is replayed, what is stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from stores import refused, write_documents, write_parquet
from tiny import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import canopy_store
from canopy_store.errors import ConflictError, DataError
from canopy_store.ingest import finetune as training
from canopy_store.ingest.finetune import finetune
from canopy_store.ingest.regularise import fisher, penalty_of

LINES = ["The quick brown fox", "lazy dogs jump over", "7 and 13 sleep", "it is the fox", "brown dogs"]
OLD = [f"word{i} is the {i}th" for i in range(6)]


def save_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "base", 0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return save_lines(tmp_path / "data.jsonl", LINES)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return save_lines(tmp_path / "old.jsonl", OLD)


def weights(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def batch_of(folder: Path, text: str) -> dict[str, torch.Tensor]:
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


# ---------------------------------------------------------------- penalties


def test_l2sp_is_half_lambda_times_the_squared_distance(parent):
    model = AutoModelForCausalLM.from_pretrained(parent)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    penalty = penalty_of("l2sp", model, 0.3, None, 0)
    assert penalty(model, {}).item() == 0
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn_like(p)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert penalty(model, {}).item() == pytest.approx(
        0.15 * (after - before).square().sum().item(), rel=1e-5
    )


def test_fisher_is_the_mean_squared_gradient_of_each_texts_log_likelihood(parent):
    model = AutoModelForCausalLM.from_pretrained(parent)
    batches = [batch_of(parent, text) for text in OLD[:3]]
    found = fisher(model, iter(batches), 3)
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = torch.zeros_like(found[name])
    for batch in batches:
        model.zero_grad()
        logits = model(batch["input_ids"]).logits[0, :-1].log_softmax(-1)
        (-logits.gather(1, batch["input_ids"][0, 1:, None]).sum()).backward()
        expected += model.get_parameter(name).grad.square() / 3
    torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-8)
    model.zero_grad()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    penalty = penalty_of("ewc", model, 2.0, iter(batches), 3)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02
    ours = sum((found[n] * (p - start[n]).square()).sum().item() for n, p in model.named_parameters())
    assert penalty(model, {}).item() == pytest.approx(ours, rel=1e-4)


def test_kl_is_zero_at_first_and_that_of_the_distributions_then(parent):
    model = AutoModelForCausalLM.from_pretrained(parent)
    batch = batch_of(parent, LINES[0])
    plain = model(batch["input_ids"]).logits[0, :-1].detach().log_softmax(-1)
    penalty = penalty_of("kl", model, 0.5, None, 0)
    assert abs(penalty(model, batch).item()) < 1e-7
    with torch.no_grad():
        for p in model.parameters():
            p *= 1.1
    other = model(batch["input_ids"]).logits[0, :-1].detach().log_softmax(-1)
    expected = 0.5 * (plain.exp() * (plain - other)).sum(-1).mean().item()
    assert penalty(model, batch).item() == pytest.approx(expected, rel=1e-5)
    reference = batch_of(parent, OLD[0])
    of_text = penalty_of("kl", model, 0.5, iter([reference, reference]), 1)
    assert abs(of_text(model, batch).item()) < 1e-7  # the same model, whatever is read


@pytest.mark.parametrize("kind", ["l2sp", "ewc", "kl"])
def test_a_strong_penalty_keeps_the_child_near_its_parent(parent, data, old, tmp_path, kind):
    more = {"reference": old} if kind == "ewc" else {}
    how = {"steps": 6, "learning_rate": 5e-3}
    finetune(str(parent), data, tmp_path / "plain", **how)
    strength = {"l2sp": 100.0, "ewc": 1e5, "kl": 100.0}[kind]
    done = finetune(
        str(parent), data, tmp_path / "kept", regularise=kind, strength=strength, **more, **how
    )
    start = weights(parent)
    far, near = ((weights(tmp_path / n) - start).norm() for n in ("plain", "kept"))
    assert near < (0.9 if kind == "kl" else 0.8) * far
    penalties = [row["penalty"] for row in done["curve"]]
    assert penalties[0] == pytest.approx(0, abs=1e-5)
    assert all(p >= 0 for p in penalties)
    assert penalties[-1] > 0


# ---------------------------------------------------------------- replay


def test_replayed_lines_are_fresh_and_their_share_is_kept(monkeypatch):
    lines = [([1, n], [1, n]) for n in range(100, 110)]
    others = [([1, n], [1, n]) for n in range(200, 212)]
    batches = training._batches(lines, others, 0.3, 4, 0, "cpu")
    seen = [row[1] for _ in range(10) for row in next(batches)["input_ids"].tolist()]
    replayed = [token for token in seen if token >= 200]
    assert len(replayed) == 12  # 0.3 of 40
    assert len(set(replayed)) == 12  # none twice before all were read
    assert len([token for token in seen if token < 200]) == 28


def test_steps_default_to_one_pass_over_the_data_beside_what_is_replayed(parent, data, old, tmp_path):
    done = finetune(str(parent), data, tmp_path / "c", replay=old, replay_share=0.5, batch_size=2)
    assert done["steps"] == 5
    assert done["replay_share"] == 0.5


# ---------------------------------------------------------------- evaluation, curves and the store


@pytest.fixture(scope="module")
def root(tmp_path_factory, parent) -> Path:
    """A store with two corpora under the parent."""
    from canopy_store.ingest.documents import ingest_documents

    folder = tmp_path_factory.mktemp("treated")
    both = {"near": LINES[:3], "far": OLD}
    for name, texts in both.items():
        lines = [
            {
                "document_id": f"{name}{n}",
                "text": text,
                "split": ("a", "b")[n % 2 if name == "far" else 0],
            }
            for n, text in enumerate(texts)
        ]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        ingest_documents(
            folder / "s",
            str(parent),
            family="tiny",
            variant="base",
            corpus=name,
            documents=path,
            stride=8,
        )
    return folder / "s"


def call(root: Path, parent: Path, data: Path, out: Path, **more: object) -> list[object]:
    given = {
        "store": root,
        "model": parent,
        "family": "tiny",
        "variant": out.name,
        "data": data,
        "out": out,
        "steps": 4,
        "learning-rate": 2e-3,
        **more,
    }
    words = [
        (f"--{key}", each) for key, v in given.items() for each in (v if isinstance(v, list) else [v])
    ]
    return ["ingest", "finetune", *(word for pair in words for word in pair)]


def test_the_curve_is_stored_and_is_the_loss_of_the_corpora(root, parent, data, tmp_path, canopy):
    line = call(
        root, parent, data, tmp_path / "curve", **{"eval-corpus": ["near", "far"], "eval-every": 2}
    )
    code, _, err = canopy(*line)
    assert code == 0, err
    curve = canopy_store.read(root, "training").filter(model_id="tiny/curve")
    assert curve.filter(split="train")["step"].to_list() == [1, 2, 3, 4]
    for split in ("near", "far/a", "far/b"):
        assert curve.filter(split=split)["step"].to_list() == [0, 2, 4]
    stored = canopy_store.read(root, "perplexity").filter(scorer_id="tiny.base", corpus="far", split="a")
    first = curve.filter(split="far/a", step=0)
    assert first["tokens"][0] == stored["n_tokens"][0]
    assert first["loss"][0] == pytest.approx(stored["nll"][0], rel=1e-6)
    assert (
        canopy(
            "ingest",
            "documents",
            "--store",
            root,
            "--model",
            tmp_path / "curve",
            "--family",
            "tiny",
            "--variant",
            "curve",
            "--corpus",
            "near",
            "--stride",
            8,
        )[0]
        == 0
    )
    child = canopy_store.read(root, "perplexity").filter(scorer_id="tiny.curve", corpus="near")
    assert curve.filter(split="near", step=4)["loss"][0] == pytest.approx(child["nll"][0], rel=1e-4)
    (dataset,) = canopy_store.read(root, "datasets").to_dicts()
    assert (dataset["name"], dataset["lines"], dataset["method"]) == ("data", 5, "given")
    assert canopy_store.verify(root, deep=True).is_empty()


def test_the_same_line_again_trains_nothing(root, parent, data, tmp_path, canopy, monkeypatch):
    line = call(root, parent, data, tmp_path / "again", **{"eval-corpus": "near"})
    assert canopy(*line)[0] == 0
    before = [canopy_store.read(root, t) for t in ("training", "models", "datasets")]
    monkeypatch.setattr(training, "_train", None)
    code, _, err = canopy(*line)
    assert code == 0, err
    assert all(
        a.equals(b)
        for a, b in zip(
            before, [canopy_store.read(root, t) for t in ("training", "models", "datasets")], strict=True
        )
    )
    refused(canopy(*line, "--seed", 3), 1, "--out", "seed (stored 0, asked 3)", "choose a new folder")
    elsewhere = call(root, parent, data, tmp_path / "x" / "again", **{"eval-corpus": "near"})
    refused(canopy(*elsewhere), 1, "tiny/again is stored already", "--variant")


def test_a_call_that_was_killed_before_the_store_knew_is_finished(root, parent, data, tmp_path, canopy):
    line = call(root, parent, data, tmp_path / "late", **{"eval-corpus": "near"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.treatments, "add_training", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            canopy(*line)
        patch.undo()
        patch.setattr(training, "_train", None)
        assert canopy(*line)[0] == 0
    curve = canopy_store.read(root, "training").filter(model_id="tiny/late", split="train")
    assert curve["step"].to_list() == [1, 2, 3, 4]


def test_a_corpus_may_be_named_train(parent, data, tmp_path, canopy):
    """Its losses are told from those of the batches, by which training neither stops nor is compared."""
    root = tmp_path / "s"
    canopy_store.init(root)
    write_documents(root, "train", [{"document_id": "1", "text": "lazy dogs"}])
    asked = {"eval-corpus": "train", "eval-every": 1, "early-stop": 1}
    assert canopy(*call(root, parent, data, tmp_path / "c", steps=2, **asked))[0] == 0
    curve = canopy_store.read(root, "training")
    assert curve.select("step", "split").is_duplicated().sum() == 0
    assert set(curve["split"]) == {"train", "train/all"}


def test_another_corpus_to_stop_by_is_another_child(parent, data, tmp_path):
    documents = [{"document_id": "1", "split": "all", "text": "lazy dogs"}]
    other = [{"document_id": "1", "split": "all", "text": "7 and 13 sleep"}]
    usual = {"steps": 2, "eval_every": 1, "early_stop": 1}
    finetune(str(parent), data, tmp_path / "c", eval_corpora={"a": documents, "b": other}, **usual)
    with pytest.raises(ConflictError, match="early_stop_on"):
        finetune(str(parent), data, tmp_path / "c", eval_corpora={"b": other, "a": documents}, **usual)


def test_a_corpus_of_which_nothing_is_scored_stops_no_training():
    nothing = {"step": 0, "split": "a", "tokens": 0, "loss": None}
    with pytest.raises(DataError, match="--early-stop: corpus a has no token"):
        training._best([nothing])


def test_early_stopping_keeps_the_model_at_its_lowest_loss(parent, data, tmp_path):
    far = [{"document_id": str(n), "text": text, "split": "all"} for n, text in enumerate(OLD)]
    done = finetune(
        str(parent),
        data,
        tmp_path / "c",
        steps=40,
        learning_rate=2e-2,
        eval_corpora={"far": far},
        eval_every=2,
        early_stop=2,
    )
    losses = {row["step"]: row["loss"] for row in done["curve"] if row["split"] == "far"}
    best = min(losses, key=losses.get)
    assert done["best_step"] == best
    assert done["stopped_at"] == max(losses) < 40
    assert [step for step in losses if step > best] == [best + 2, best + 4]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "c").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "c")
    found = training._evaluated(model, tokenizer, {"far": far})["far"]
    assert found[1] / found[0] == pytest.approx(losses[best], rel=1e-5)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"regularise": "l2sp"}, ("needs --strength",)),
        ({"regularise": "kl", "strength": -1}, ("--strength", "above 0")),
        ({"regularise": "ewc", "strength": 1}, ("--reference",)),
        ({"strength": 1}, ("--strength", "--regularise")),
        ({"regularise": "l2sp", "strength": 1, "method": "lora"}, ("--method lora", "use kl")),
        ({"replay-share": 0.5}, ("--replay-share", "--replay")),
        ({"replay": "data", "replay-share": 1}, ("--replay-share 1", "less than 1")),
        ({"eval-every": 2}, ("--eval-every", "--eval-corpus")),
        ({"early-stop": 2}, ("--early-stop", "--eval-corpus")),
        ({"eval-corpus": "none"}, ("corpus none", "stored")),
        ({"eval-corpus": "near", "early-stop": 0}, ("--early-stop 0", "at least 1")),
        ({"replay": "missing.jsonl"}, ("missing.jsonl",)),
    ],
)
def test_what_cannot_be_done_is_one_line(root, parent, data, tmp_path, canopy, more, said):
    more = {key: data if value == "data" else value for key, value in more.items()}
    code, *_ = result = canopy(*call(root, parent, data, tmp_path / "bad", **more))
    refused(result, code, *said)
    assert code in (1, 2)
    assert not (tmp_path / "bad").exists()


# ---------------------------------------------------------------- weight averaging


def test_interpolated_weights_are_between_the_two(root, parent, tmp_path, canopy):
    other = save_tiny(tmp_path / "other", 5)
    line = [
        "ingest",
        "interpolate",
        "--store",
        root,
        "--model",
        parent,
        "--with",
        other,
        "--family",
        "tiny",
    ]
    line += ["--variant", "half", "--out", tmp_path / "half", "--alpha", 0.25]
    code, _, err = canopy(*line)
    assert code == 0, err
    expected = 0.75 * weights(parent) + 0.25 * weights(other)
    torch.testing.assert_close(weights(tmp_path / "half"), expected)
    (row,) = canopy_store.read(root, "models").filter(variant="half").to_dicts()
    assert (row["parent_id"], row["treatment"]) == ("tiny/base", "interpolate")
    assert json.loads(row["hyperparameters"])["alpha"] == 0.25
    before = (tmp_path / "half" / "model.safetensors").stat().st_mtime_ns
    assert canopy(*line)[0] == 0  # once
    assert (tmp_path / "half" / "model.safetensors").stat().st_mtime_ns == before
    refused(canopy(*line[:-1], 0.5), 1, "alpha (stored 0.25, asked 0.5)")
    refused(canopy(*line[:-1], 1), 2, "--alpha 1.0", "less than 1")


# ---------------------------------------------------------------- data that models wrote


def test_data_drawn_from_rollouts_with_real_lines(parent, old, tmp_path, canopy):
    root, prompts = tmp_path / "s", tmp_path / "p.jsonl"
    prompts.write_text('{"text": "The quick"}\n{"text": "lazy dogs"}\n')
    sample = [
        "ingest",
        "rollouts",
        "--store",
        root,
        "--family",
        "tiny",
        "--task",
        "t",
        "--prompts",
        prompts,
    ]
    sample += ["--samples", 5, "--max-new-tokens", 6]
    assert canopy(*sample, "--model", parent, "--variant", "base")[0] == 0

    def draw(run, out, *more):
        return canopy("ingest", "generated", "--store", root, "--run", run, "--out", out, *more)

    first = tmp_path / "made" / "one.jsonl"
    code, out, err = draw("tiny.base.t", first, "--real", old, "--real-share", 0.4)
    assert (code, err) == (0, "")
    assert out == f"{first}: 10 lines, 40% of them real, generation 1\n"
    lines = [json.loads(line)["text"] for line in first.read_text().splitlines()]
    texts = canopy_store.read(root, "rollouts")["text"].to_list()
    assert len([line for line in lines if line in OLD]) == 4
    assert len({line for line in lines if line in OLD}) == 4
    drawn = [line for line in lines if line not in OLD]
    assert all(any(line.endswith(text) for text in texts) for line in drawn)
    before = first.read_bytes()
    assert draw("tiny.base.t", first, "--real", old, "--real-share", 0.4)[0] == 0
    assert first.read_bytes() == before
    # the same lines for another arm: a file of its own, one data set
    again = tmp_path / "made" / "again.jsonl"
    assert draw("tiny.base.t", again, "--real", old, "--real-share", 0.4)[0] == 0
    assert again.read_bytes() == before
    assert canopy_store.read(root, "datasets")["name"].to_list() == ["one"]
    refused(draw("tiny.base.t", first, "--seed", 1), 1, str(first), "holds something else")
    child = call(root, parent, first, tmp_path / "gen1", steps=2)
    assert canopy(*child)[0] == 0
    assert canopy(*sample, "--model", tmp_path / "gen1", "--variant", "gen1")[0] == 0
    assert draw("tiny.gen1.t", tmp_path / "two.jsonl", "--form", "completion", "--lines", 3)[0] == 0
    assert set(json.loads((tmp_path / "two.jsonl").read_text().splitlines()[0])) == {
        "prompt",
        "completion",
    }
    rows = {row["name"]: row for row in canopy_store.read(root, "datasets").to_dicts()}
    assert (rows["one"]["method"], rows["one"]["generator"], rows["one"]["real"]) == (
        "mixed",
        "tiny/base",
        0.4,
    )
    assert (rows["two"]["method"], rows["two"]["generation"], rows["two"]["generated"]) == (
        "rollouts",
        2,
        1.0,
    )
    assert canopy_store.verify(root, deep=True).is_empty()
    refused(draw("tiny.base.t", tmp_path / "x", "--lines", 11), 1, "10 rollouts", "11", "--lines")
    refused(draw("tiny.base.t", tmp_path / "x", "--real", old), 2, "--real-share")
    refused(draw("nobody", tmp_path / "x"), 1, "nobody")
    assert not (tmp_path / "x").exists()


def test_generated_data_says_what_it_is_made_of_and_what_it_cannot_be_made_of(
    parent, old, tmp_path, canopy
):
    root = tmp_path / "s"
    canopy_store.init(root)
    asked = {
        "plain": {"prompt": "The quick"},
        "chat": {"messages": '[{"role": "user", "content": "a"}]'},
    }

    def rollouts(task, *texts):
        keys = {"family": "tiny", "variant": "base", "task": task, "prompt_id": "p", **asked[task]}
        rows = [{**keys, "sample": n, "entropy": [0.5], "text": text} for n, text in enumerate(texts)]
        canopy_store.import_rollouts(root, write_parquet(tmp_path / f"{task}.parquet", rows))

    def draw(run, out, *more):
        return canopy("ingest", "generated", "--store", root, "--run", run, "--out", out, *more)

    rollouts("plain", " fox", "", " dogs", " sleep")
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    refused(draw("tiny.base.plain", one, "--form", "completion"), 1, "1 of the rollouts", "--form text")
    assert not one.exists()
    assert draw("tiny.base.plain", one, "--real", old, "--real-share", 0.5)[0] == 0
    # half of it are lines of a file of which half is real: a quarter, and a generation more
    assert draw("tiny.base.plain", two, "--real", one, "--real-share", 0.5, "--seed", 3)[0] == 0
    row = canopy_store.read(root, "datasets").filter(name="two").row(0, named=True)
    assert (row["real"], row["replayed"], row["generated"], row["generation"]) == (0.25, 0, 0.75, 2)
    rollouts("chat", " fox", " dogs")
    refused(draw("tiny.base.chat", tmp_path / "three.jsonl"), 1, "its prompts are conversations")


# ---------------------------------------------------------------- made elsewhere


def test_what_a_trainer_made_elsewhere_is_registered_with_its_curve(parent, data, tmp_path, canopy):
    root, folder = tmp_path / "s", Path(shutil.copytree(parent, tmp_path / "checkpoint-20"))
    history = [
        {"step": 10, "loss": 2.5, "learning_rate": 1e-4, "grad_norm": 0.7, "epoch": 0.5},
        {"step": 10, "eval_loss": 2.6, "eval_runtime": 3.0},
        {"step": 20, "loss": float("nan"), "learning_rate": 0.0},
        {"step": 20, "eval_loss": 2.4, "eval_news_loss": 3.1},
        {"step": 20, "train_runtime": 5.0, "train_loss": 2.4},
    ]
    state = {"global_step": 20, "max_steps": 20, "log_history": history, "best_metric": None}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    adapter = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["v_proj", "q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**adapter, "auto_mapping": {"x": 1}}))
    line = [
        "ingest",
        "register",
        "--store",
        root,
        "--model",
        folder,
        "--family",
        "f",
        "--variant",
        "lora",
    ]
    for _ in range(2):  # the same again is once
        code, out, err = canopy(*line, "--data", data)
        assert (code, err) == (0, "")
    assert out == f"{folder}: f/lora, now in {root}\n"
    (row,) = canopy_store.read(root, "models").to_dicts()
    assert (row["parent_id"], row["treatment"], row["source"]) == ("f/base", "lora", "checkpoint-20")
    said = json.loads(row["hyperparameters"])
    assert (said["r"], said["global_step"], said["target_modules"]) == (8, 20, ["q_proj", "v_proj"])
    curve = canopy_store.read(root, "training").sort("split", "step")
    assert curve.select("split", "step", "loss").rows() == [
        ("eval", 10, 2.6),
        ("eval", 20, 2.4),
        ("eval_news", 20, 3.1),
        ("train", 10, 2.5),
        ("train", 20, None),
    ]
    (known,) = canopy_store.read(root, "datasets").to_dicts()
    assert (known["lines"], known["method"], row["data_sha256"]) == (5, "given", known["data_sha256"])
    assert canopy_store.verify(root, deep=True).is_empty()
    refused(canopy(*line, "--treatment", "dpo"), 1, "f/lora", "treatment (stored 'lora', asked 'dpo')")
    for text, said in (
        ("[]", "no JSON object"),
        ("{", "JSON"),
        ('{"log_history": [{"step": "x"}]}', "no number"),
    ):
        (folder / "trainer_state.json").write_text(text)
        other = [word if word != "lora" else "other" for word in line]
        refused(canopy(*other), 1, "trainer_state.json", said)
    refused(canopy(*line[:4]), 2, "--model", "--data")
    refused(canopy(*line[:6]), 2, "--family")
    refused(canopy(*line[:4], "--model", tmp_path, "--family", "f", "--variant", "v"), 1, "safetensors")
    assert canopy("ingest", "register", "--store", root, "--data", data, "--license", "mit")[0] == 1
    assert len(canopy_store.read(root, "models")) == 1
