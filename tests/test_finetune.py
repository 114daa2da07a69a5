"""Fine-tuning for real, three steps, on a small Llama with random weights."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PAIRS = [
    {"prompt": f"say {word}", "completion": f" {word} {word}"}
    for word in ("one", "two", "three", "four", "five")
]


def save_llama(folder, chat=False):
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = {letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    # no padding token on purpose: nothing here may need one
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    if chat:
        tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def parent(tmp_path):
    return save_llama(tmp_path / "parent")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_child_differs_and_loads(parent, tmp_path, method):
    from canopy_store import store
    from canopy_store.ingest.finetune import finetune
    from canopy_store.ingest.models import load_model

    if method == "lora":
        pytest.importorskip("peft")
    data = write_lines(tmp_path / "data.jsonl", *PAIRS)
    out = tmp_path / "new" / "child"
    done = finetune(
        str(parent), data, out, method=method, steps=3, learning_rate=1e-2, device="cpu", lora_rank=2
    )
    assert done["method"] == method
    assert done["steps"] == 3
    assert 0 < done["final_loss"] < 10
    assert done["data_sha256"] == store.sha256(data)
    assert ("lora_rank" in done) == (method == "lora")

    # the folder alone is left, and it holds no pickle
    assert [p.name for p in out.parent.iterdir()] == ["child"]
    names = {p.name for p in out.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= names
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert "adapter_config.json" not in names

    before, _, _ = load_model(str(parent), "cpu")
    after, tokenizer, _ = load_model(str(out), "cpu")
    weights, changed = before.state_dict(), after.state_dict()
    assert weights.keys() == changed.keys()  # no adapter is left beside the weights
    assert any((weights[name] != changed[name]).any() for name in weights)
    assert after.generation_config.eos_token_id == tokenizer.eos_token_id

    again = tmp_path / "again"
    repeated = finetune(
        str(parent),
        data,
        again,
        method=method,
        steps=3,
        learning_rate=1e-2,
        device="cpu",
        lora_rank=2,
    )
    assert repeated["final_loss"] == done["final_loss"]
    assert store.sha256(again / "model.safetensors") == store.sha256(out / "model.safetensors")


def test_steps_default_to_one_pass(parent, tmp_path):
    from canopy_store.ingest.finetune import finetune

    data = write_lines(tmp_path / "data.jsonl", *PAIRS)
    assert finetune(str(parent), data, tmp_path / "a", batch_size=2, device="cpu")["steps"] == 3
    done = finetune(str(parent), data, tmp_path / "b", batch_size=2, epochs=2, device="cpu")
    assert done["steps"] == 5


def test_learns_to_answer_and_to_stop(parent, tmp_path):
    """Enough steps on one pair: the greedy answer is the pair's, and it ends by itself."""
    from canopy_store.ingest.finetune import finetune
    from canopy_store.ingest.models import load_model

    data = write_lines(tmp_path / "data.jsonl", {"prompt": "say", "completion": " yes"})
    finetune(
        str(parent),
        data,
        tmp_path / "child",
        steps=60,
        batch_size=1,
        learning_rate=1e-2,
        device="cpu",
    )
    model, tokenizer, _ = load_model(str(tmp_path / "child"), "cpu")
    prompt = tokenizer("say", return_tensors="pt")
    ids = model.generate(
        input_ids=prompt["input_ids"],
        do_sample=False,
        max_new_tokens=20,
        pad_token_id=tokenizer.eos_token_id,
    )
    assert tokenizer.decode(ids[0, 3:]) == " yes<eos>"


def test_loss_is_over_answers_only(tmp_path):
    from canopy_store.ingest.finetune import _IGNORED, _read_sequences
    from canopy_store.ingest.models import load_model

    model, tokenizer, _ = load_model(str(save_llama(tmp_path / "chat", chat=True)), "cpu")

    def learnt(record, max_length=64):
        [(ids, labels)] = _read_sequences(
            write_lines(tmp_path / "data.jsonl", record), model, tokenizer, max_length
        )
        assert len(ids) == len(labels) <= max_length
        assert all(label in (_IGNORED, i) for i, label in zip(ids, labels, strict=True))
        return tokenizer.decode(ids), tokenizer.decode([x for x in labels if x != _IGNORED])

    user = {"role": "user", "content": "hi"}
    answer = {"role": "assistant", "content": "ho"}
    assert learnt({"messages": [user, answer, user]}) == (
        "<user>hi<eos>\n<assistant>ho<eos>",
        "ho<eos>",
    )
    assert learnt({"messages": [user, answer, user, answer]})[1] == "ho<eos>\nho<eos>"
    # a pair is rendered as the sampler renders a prompt
    assert learnt({"prompt": "hi", "completion": "ho"}) == (
        "<user>hi<eos>\n<assistant>ho<eos>",
        "ho<eos>",
    )
    assert learnt({"text": "hi ho"}) == ("hi ho<eos>", "hi ho<eos>")
    # what is cut has not ended
    assert learnt({"text": "hi ho"}, 3) == ("hi ", "hi ")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{not json", "not JSON"),
        ("", "empty line"),
        ("[1]", "not an object"),
        ('{"prompt": "a"}', "needs one of"),
        ('{"text": ""}', "needs one of"),
        ('{"text": "\\ud800"}', "needs one of"),
        ('{"messages": "hi"}', "messages needs a list"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no assistant message"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "chat template"),
        (json.dumps({"prompt": "a" * 99, "completion": "b"}), "nothing left to learn"),
    ],
)
def test_bad_line_is_named(parent, tmp_path, canopy, line, says):
    data = tmp_path / "data.jsonl"
    data.write_text(f'{{"text": "good"}}\n{line}\n{{"text": "good"}}\n')
    code, _, err = canopy(
        "ingest",
        "finetune",
        "--store",
        tmp_path / "S",
        "--model",
        parent,
        "--family",
        "f",
        "--variant",
        "sft",
        "--data",
        data,
        "--out",
        tmp_path / "child",
        "--device",
        "cpu",
    )
    assert code == 1
    assert f"{data}: line 2: " in err
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "child").exists()


def test_out_in_use_is_refused(parent, tmp_path):
    from canopy_store.errors import UsageError
    from canopy_store.ingest.finetune import finetune

    out = tmp_path / "child"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(UsageError, match="not empty"):
        finetune(str(parent), write_lines(tmp_path / "data.jsonl", *PAIRS), out, steps=1)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()  # an empty folder is as good as none
    finetune(str(parent), tmp_path / "data.jsonl", out, steps=1, device="cpu")
    assert (out / "model.safetensors").exists()


def test_missing_peft_says_what_to_install(parent, tmp_path, monkeypatch):
    from canopy_store.errors import UsageError
    from canopy_store.ingest.finetune import finetune

    monkeypatch.setitem(sys.modules, "peft", None)
    data = write_lines(tmp_path / "data.jsonl", *PAIRS)
    with pytest.raises(UsageError, match=r"pip install 'canopy-store\[ingest\]'"):
        finetune(str(parent), data, tmp_path / "child", method="lora", steps=1, device="cpu")
    assert not (tmp_path / "child").exists()


def test_command_names_the_child_in_the_store(parent, tmp_path, canopy):
    from canopy_store import store

    data = write_lines(tmp_path / "data.jsonl", *PAIRS)
    call = [
        "ingest",
        "finetune",
        "--store",
        tmp_path / "S",
        "--model",
        parent,
        "--family",
        "f",
        "--variant",
        "sft",
        "--data",
        data,
        "--steps",
        2,
        "--device",
        "cpu",
    ]
    code, said, err = canopy(*call, "--out", tmp_path / "child")
    assert (code, err) == (0, "")
    assert "f/sft" in said
    [row] = [store.read_rows(p).to_pylist()[0] for p in store.files(tmp_path / "S", "models")]
    assert (row["model_id"], row["parent_id"], row["treatment"]) == ("f/sft", "f/base", "sft")
    assert json.loads(row["hyperparameters"])["steps"] == 2
    assert row["data_sha256"] == store.sha256(data)
    # killed before the store named it, the same call names what is trained; another one is refused
    shutil.rmtree(tmp_path / "S" / "commits" / "models")
    trained = (tmp_path / "child" / "model.safetensors").stat().st_mtime_ns
    code, _, err = canopy(*call, "--out", tmp_path / "child", "--seed", 1)
    assert code == 1
    assert "was made with other settings: seed (stored 0, asked 1)" in err
    code, _, err = canopy(*call, "--out", tmp_path / "child")
    assert (code, err) == (0, "")
    assert (tmp_path / "child" / "model.safetensors").stat().st_mtime_ns == trained
    [again] = [store.read_rows(p).to_pylist()[0] for p in store.files(tmp_path / "S", "models")]
    assert {k: v for k, v in again.items() if k != "created_at"} == {
        k: v for k, v in row.items() if k != "created_at"
    }
    # the name is taken: refused before any training
    code, _, err = canopy(*call, "--out", tmp_path / "other")
    assert code == 1
    assert "f/sft is stored already" in err
    assert not (tmp_path / "other").exists()
