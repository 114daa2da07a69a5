"""What an embedder may hold, and what its identity follows from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from stores import write_prompts

import canopy_store
from canopy_store import store
from canopy_store.errors import StoreError
from canopy_store.ingest.embedder import open_embedder, weights_sha256

PACKAGE = "canopy_store_embedder_code"


@pytest.fixture(scope="session")
def dense(tmp_path_factory, chain) -> Path:
    """A saved embedder: the chain's transformer, mean pooling, a Dense layer and unit length."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    torch.manual_seed(0)
    modules = [Transformer(str(chain)), Pooling(8), Dense(8, 3), Normalize()]
    modules[0].tokenizer.pad_token = "a"
    folder = tmp_path_factory.mktemp("embedder") / "dense"
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder))
    return folder


@pytest.fixture
def embedder(dense, tmp_path) -> Path:
    return shutil.copytree(dense, tmp_path / "embedder")


def change(file: Path, changed: Callable[[object], object]) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps(changed(content) or content))


def identity(folder: Path) -> str:
    return open_embedder(str(folder), "cpu")[1]["files_sha256"]


def pools_by(mode: str) -> Callable[[Path], None]:
    return lambda folder: change(
        folder / "1_Pooling" / "config.json", lambda c: {**c, "pooling_mode": mode}
    )


def dense_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "2_Dense" / "model.safetensors"
    save_file({name: -values for name, values in load_file(file).items()}, file)


# ---------------------------------------------------------------- identity


def test_it_embeds_as_sentence_transformers_does(embedder):
    from sentence_transformers import SentenceTransformer

    encoder, known = open_embedder(str(embedder), "cpu")
    texts = ["a b", "g"]
    assert encoder.encode(texts).shape == (2, 3)
    assert np.allclose(encoder.encode(texts), SentenceTransformer(str(embedder)).encode(texts))
    assert len(known["files_sha256"]) == 64


@pytest.mark.parametrize(
    "changed",
    [
        pools_by("max"),
        dense_weights,
        lambda folder: change(folder / "2_Dense" / "config.json", lambda c: {**c, "bias": True, "x": 1}),
        lambda folder: change(folder / "modules.json", lambda modules: modules[:-1]),
        lambda folder: change(folder / "tokenizer_config.json", lambda c: {**c, "model_max_length": 4}),
        lambda folder: change(folder / "config.json", lambda c: {**c, "rms_norm_eps": 0.5}),
        lambda folder: change(
            folder / "sentence_bert_config.json", lambda c: {**c, "max_seq_length": 2}
        ),
        lambda folder: change(
            folder / "config_sentence_transformers.json", lambda c: {**c, "default_prompt_name": None}
        ),
        lambda folder: (folder / "vocab.txt").write_text("a\n"),
    ],
)
def test_every_file_that_matters_changes_the_identity(embedder, changed):
    first = identity(embedder)
    changed(embedder)
    assert identity(embedder) != first


def test_a_card_and_a_place_do_not_change_the_identity(embedder, tmp_path):
    first = identity(embedder)
    moved = shutil.copytree(embedder, tmp_path / "moved")
    (moved / "README.md").write_text("another card")
    (moved / ".git").mkdir()
    (moved / ".git" / "config.json").write_text("no JSON")
    assert identity(moved) == first
    link = tmp_path / "link"
    link.symlink_to(moved)
    assert identity(link) == first


def test_the_hubs_cache_links_to_its_blobs(embedder, tmp_path):
    snapshot = tmp_path / "models--lab--e" / "snapshots" / "0123"
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(p for p in embedder.rglob("*") if p.is_file())):
        link = snapshot / file.relative_to(embedder)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    assert identity(snapshot) == identity(embedder)


def test_another_pooling_is_another_embedder_and_an_older_store_goes_on(
    tmp_path, chain, canopy, embedder
):
    root, prompts = tmp_path / "s", write_prompts(tmp_path / "p.jsonl", "a b", "g")
    names = ("--family", "f", "--variant", "base", "--task", "t")

    def sample(run: str) -> None:
        line = ("--store", root, "--model", chain, "--prompts", prompts, "--samples", 3, "--run", run)
        code, _, err = canopy("ingest", "rollouts", *line, *names, "--max-new-tokens", 8)
        assert code == 0, err

    line = ("ingest", "embed", "--store", root, "--embedder", embedder, "--device", "cpu")
    sample("one")
    assert canopy(*line)[0] == 0
    plan = store.plan_path(root, "embedder", "embedder")
    assert store.read_plan(plan)["settings"]["files_sha256"] == identity(embedder)
    pools_by("max")(embedder)
    code, _, err = canopy(*line)
    assert code == 1
    assert "files_sha256 (stored" in err
    # a store that was made before the files were hashed knows the weights alone
    recorded = json.loads(plan.read_text())
    del recorded["settings"]["files_sha256"]
    recorded["settings"]["weights_sha256"] = weights_sha256(str(embedder))
    plan.write_text(json.dumps(recorded))
    sample("two")
    code, _, err = canopy(*line)
    assert code == 0, err
    assert len(canopy_store.read(root, "embeddings")) == 12
    dense_weights(embedder)
    code, _, err = canopy(*line)
    assert code == 1
    assert "weights_sha256 (stored" in err


# ---------------------------------------------------------------- what is refused


def typed(kind: object, at: int = 1) -> Callable[[Path], None]:
    def retype(modules):
        modules[at]["type"] = kind

    return lambda folder: change(folder / "modules.json", retype)


def placed(place: object) -> Callable[[Path], None]:
    def move(modules):
        modules[1]["path"] = place

    return lambda folder: change(folder / "modules.json", move)


def setting(file: str, key: str, value: object) -> Callable[[Path], None]:
    return lambda folder: change(folder / file, lambda content: {**content, key: value})


def pickled(folder: Path) -> None:
    weights = folder / "2_Dense" / "model.safetensors"
    torch.save({"x": torch.zeros(1)}, weights.with_name("pytorch_model.bin"))
    weights.unlink()


def pickled_with_index(content: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        pickled(folder)
        (folder / "2_Dense" / "model.safetensors.index.json").write_text(json.dumps(content))

    return damage


def index(content: object) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def linked_out(folder: Path) -> None:
    shutil.move(folder / "1_Pooling", folder.parent / "outside")
    (folder / "1_Pooling").symlink_to(folder.parent / "outside")


def file_linked_out(folder: Path) -> None:
    shutil.move(folder / "tokenizer.json", folder.parent / "tokenizer.json")
    (folder / "tokenizer.json").symlink_to(folder.parent / "tokenizer.json")


def routed(kind: str, inner: str = "inner") -> Callable[[Path], None]:
    def nest(folder: Path) -> None:
        typed("sentence_transformers.base.modules.Router", 0)(folder)
        content = {"types": {inner: kind}, "structure": {"query": [inner]}, "parameters": {}}
        (folder / "router_config.json").write_text(json.dumps(content))

    return nest


OWN = "is no module of sentence-transformers' own"
INSIDE = "needs to be a folder inside the embedder's"
FOREIGN = "names code or files from elsewhere"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (typed(f"{PACKAGE}.Pooling"), OWN),
        (typed("modeling_mine.Pooling"), OWN),
        (typed("torch.nn.Identity"), OWN),
        (typed("sentence_transformers.SentenceTransformer"), OWN),
        (typed("sentence_transformers.util.import_from_string"), OWN),
        (typed("sentence_transformers.base.modules.module.torch.nn.Identity"), OWN),
        (typed("sentence_transformers"), OWN),
        (typed("sentence_transformers.models.NoSuchModule"), OWN),
        (typed("sentence_transformers..os.system"), OWN),
        (typed(None), OWN),
        (typed(["sentence_transformers.models.Pooling"]), OWN),
        (placed("../outside"), INSIDE),
        (placed("1_Pooling/../../outside"), INSIDE),
        (placed("/etc"), INSIDE),
        (placed(".hidden"), INSIDE),
        (placed(None), INSIDE),
        (placed("\0"), INSIDE),
        (placed("x" * 5000), INSIDE),
        (placed("\ud800"), INSIDE),
        (linked_out, "1_Pooling: a link; copy what it links to"),
        (file_linked_out, "tokenizer.json: a link; copy what it links to"),
        (routed(f"{PACKAGE}.Router"), OWN),
        (routed("sentence_transformers.models.Transformer", "../outside"), INSIDE),
        (setting("config.json", "auto_map", {"AutoModel": f"{PACKAGE}.Model"}), FOREIGN),
        (setting("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["x.T", None]}), FOREIGN),
        (setting("sentence_bert_config.json", "model_args", {"trust_remote_code": True}), FOREIGN),
        (setting("sentence_bert_config.json", "model_kwargs", {"use_kernels": True}), FOREIGN),
        (setting("sentence_bert_config.json", "tokenizer_name_or_path", "/elsewhere"), FOREIGN),
        (setting("config.json", "attn_implementation", "someone/kernels"), FOREIGN),
        (setting("2_Dense/config.json", "activation_function", f"{PACKAGE}.Tanh"), FOREIGN),
        (setting("2_Dense/config.json", "activation_function", "torch.hub.load"), FOREIGN),
        (pickled, "2_Dense: pytorch_model.bin is pickled, and pickled weights are not loaded; if you"),
        (pickled_with_index({}), "2_Dense: pytorch_model.bin is pickled"),
        (pickled_with_index({"weight_map": {"x": "pytorch_model.bin"}}), "pytorch_model.bin is pickled"),
        (lambda folder: (folder / "pytorch_model.bin").write_bytes(b""), "already, remove it"),
        (index({}), "needs a weight_map that names safetensors"),
        (index([]), "needs a weight_map that names safetensors"),
        (index({"weight_map": {"x": "weights.dat"}}), "names 'weights.dat', which is no safetensors"),
        (index({"weight_map": {"x": "2_Dense/model.safetensors"}}), "no safetensors file beside it"),
        (index({"weight_map": {"x": 5}}), "names '5', which is no safetensors file"),
        (lambda folder: os.mkfifo(folder / "special_config.json"), "not a regular file"),
        (lambda folder: (folder / "1_Pooling" / "config.json").write_text("[1]"), "cannot be loaded: "),
        (setting("2_Dense/config.json", "activation_function", "torch.nn.NoSuch"), "cannot be loaded: "),
        (setting("2_Dense/config.json", "activation_function", "torch.nn.Module"), "cannot be loaded: "),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "merge it into the model"),
        (lambda folder: (folder / "modules.json").write_text("{}"), "needs a list of modules"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "cannot be loaded: "),
    ],
)
def test_what_may_run_code_or_lies_elsewhere_is_refused_before_anything_is_loaded(
    embedder, tmp_path, monkeypatch, damage, says
):
    ran = tmp_path / "ran"
    body = f"open({str(ran)!r}, 'w')\nfrom sentence_transformers.models import Pooling, Router\n"
    for folder in (tmp_path / "path", embedder):
        folder.mkdir(exist_ok=True)
        (folder / f"{PACKAGE}.py").write_text(body)
        (folder / "modeling_mine.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path / "path")
    damage(embedder)
    with pytest.raises(StoreError) as raised:
        open_embedder(str(embedder), "cpu")
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not ran.exists()


def test_a_router_of_own_modules_is_checked_inside(embedder, tmp_path):
    """Its modules' files too: what is pickled inside is refused."""
    routed("sentence_transformers.models.Dense", "2_Dense")(embedder)
    pickled(embedder)
    with pytest.raises(StoreError, match=r"2_Dense: pytorch_model.bin is pickled"):
        open_embedder(str(embedder), "cpu")


def test_a_file_is_no_embedder(chain):
    with pytest.raises(StoreError, match="an embedder is a folder"):
        open_embedder(str(chain / "config.json"))
