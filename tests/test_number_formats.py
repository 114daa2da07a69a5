"""Number formats that are emulated: each by another derivation, and what a scorer in one stores."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from stores import refused
from transformers import AutoModelForCausalLM

import canopy_store
from canopy_store.ingest.number_formats import Emulation, l_mul, product, rounded, rounded_weights

FORMATS = ("bf16", "fp16", "e4m3", "e5m2", "int8", "int4", "lmul-7", "lmul-3")


def l_mul_of(x: float, y: float, bits: int) -> float:
    """L-Mul of two numbers by its formula, a carry into the exponent included."""
    if x == 0 or y == 0:
        return 0.0
    extra = bits if bits <= 3 else 3 if bits == 4 else 4

    def parts(value: float) -> tuple[float, int]:
        mantissa, exponent = math.frexp(abs(value))  # [1/2, 1)
        fraction = round((2 * mantissa - 1) * 2**bits) / 2**bits  # ties to even; ours upwards
        return (0.0, exponent) if fraction == 1 else (fraction, exponent - 1)

    (a, i), (b, j) = parts(x), parts(y)
    total = a + b + 2.0**-extra
    size = (1 + total if total < 1 else 2 * total) * 2.0 ** (i + j)
    return math.copysign(size, x * y)


@pytest.mark.parametrize("bits", [2, 3, 4, 7, 23])
def test_l_mul_is_its_formula(bits):
    rng = np.random.default_rng(bits)
    x = (rng.normal(size=(5, 7)) * 10.0 ** rng.integers(-3, 4, (5, 7))).astype(np.float32)
    w = rng.normal(size=(6, 7)).astype(np.float32)
    x[0, 0], w[0, 1] = 0, 0
    expected = [[sum(l_mul_of(a, b, bits) for a, b in zip(r, c, strict=True)) for c in w] for r in x]
    found = l_mul(torch.tensor(x), torch.tensor(w), bits)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)


def test_errors_of_l_mul_are_those_of_its_docs():
    rng = np.random.default_rng(0)
    x, y = (torch.tensor(1 + rng.random(4000), dtype=torch.float32) for _ in range(2))
    for bits, bias, spread in ((23, 0.004, 0.031), (7, 0.004, 0.031), (4, 0.05, None), (2, 0.14, None)):
        made = torch.cat([l_mul(a.view(1, 1), b.view(1, 1), bits)[0] for a, b in zip(x, y, strict=True)])
        error = made / (x * y) - 1
        assert abs(error.mean() - bias) < 0.006
        if spread:
            assert abs(error.square().mean().sqrt() - spread) < 0.002


def test_rounding_is_that_of_each_format():
    x = torch.tensor([[1.0, -0.3, 0.001, 127.0], [0.5, 0.25, -0.125, 0.0]])
    assert torch.equal(rounded(x, "bf16"), x.to(torch.bfloat16).float())
    assert torch.equal(
        rounded(x, "int8"),
        torch.round(x / (x.abs().amax(1, True) / 127)) * (x.abs().amax(1, True) / 127),
    )
    for name, step in (("e4m3", 2**-3), ("e5m2", 2**-2)):
        found = rounded(x, name)
        assert found[0, 3] == 127  # the largest of a row is kept
        assert ((found - x).abs() <= x.abs() * step / 2 + 1e-3).all()
    weights = torch.linspace(-1, 1, 2 * 40).reshape(2, 40)  # a group of 32, and one of 8
    found = rounded_weights(weights, "int4")
    for row in range(2):
        for part in (slice(0, 32), slice(32, 40)):
            scale = weights[row, part].abs().max() / 7
            steps = found[row, part] / scale
            assert torch.allclose(steps, steps.round(), atol=1e-4)
            assert ((found[row, part] - weights[row, part]).abs() <= scale / 2 + 1e-6).all()
    assert torch.equal(product(x, x, "int4"), x @ x.T)  # inputs as they are


def test_a_model_is_itself_again_after_it(chain):
    model = AutoModelForCausalLM.from_pretrained(chain)
    ids = torch.tensor([[1, 2, 3]])
    before = model(ids).logits
    emulation = Emulation(model, "int4")
    with emulation.on():
        assert not torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, before)
    assert emulation.macs == sum(
        m.weight.numel() for m in model.modules() if type(m).__name__ == "Linear"
    )
    with pytest.raises(canopy_store.UsageError, match="float32"):
        Emulation(model.to(torch.bfloat16), "int8")


@pytest.fixture(scope="module")
def root(tmp_path_factory, chain) -> Path:
    """A corpus under the chain, plain and in each format."""
    from canopy_store.ingest.documents import ingest_documents

    folder = tmp_path_factory.mktemp("formats")
    lines = [{"document_id": f"d{n}", "text": t} for n, t in enumerate(("a b c d", "g f e", "b b a c"))]
    (folder / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in (None, *FORMATS):
        ingest_documents(
            folder / "s",
            str(chain),
            family="chain",
            variant="base",
            corpus="c",
            documents=folder / "d.jsonl",
            number_format=name,
        )
    return folder / "s"


def test_scores_in_a_format_are_those_of_the_model_in_it(root, chain):
    scores = canopy_store.read(root, "document_scores")
    model = AutoModelForCausalLM.from_pretrained(chain)
    for name in FORMATS:
        emulation = Emulation(model, name)
        for row in scores.filter(scorer_id=f"chain.base.{name}").to_dicts():
            ids = torch.tensor([row["token_ids"]])
            plain = model(ids).logits[0, :-1].double().log_softmax(-1)
            with emulation.on():
                other = model(ids).logits[0, :-1].double().log_softmax(-1)
            n = row["n_tokens"]
            kl = (plain.exp() * (plain - other)).sum(-1)[-n:]
            expected = other.gather(1, ids[0, 1:, None])[-n:, 0]
            if n < len(row["token_ids"]):
                np.testing.assert_allclose(row["logprob"], expected.detach(), rtol=1e-4, atol=1e-5)
                assert row["kl_sum"] == pytest.approx(float(kl.sum().detach()), rel=1e-3, abs=1e-5)


def test_the_view_puts_a_format_beside_the_plain_model(root):
    shown = {row["number_format"]: row for row in canopy_store.read(root, "number_formats").to_dicts()}
    assert set(shown) == set(FORMATS)
    scores = {
        (row["scorer_id"], row["document_id"]): row
        for row in canopy_store.read(root, "document_scores").to_dicts()
    }
    scorers = {r["scorer_id"]: r for r in canopy_store.read(root, "scorers").to_dicts()}
    assert scorers["chain.base"]["macs"] is None
    for name, row in shown.items():
        of = [scores[f"chain.base.{name}", f"d{n}"] for n in range(3)]
        plain = [scores["chain.base", f"d{n}"] for n in range(3)]
        tokens = [each["n_tokens"] for each in of]
        deltas = [p["logprob_sum"] - o["logprob_sum"] for o, p in zip(of, plain, strict=True)]
        kls = [each["kl_sum"] for each in of]
        assert all(kl > 0 for kl in kls)
        for column, values in (("delta_nll", deltas), ("kl", kls)):
            rate = sum(values) / sum(tokens)
            assert row[column] == pytest.approx(rate, abs=1e-12)
            spread = sum((v - rate * t) ** 2 for v, t in zip(values, tokens, strict=True))
            assert row[f"{column}_se"] == pytest.approx(math.sqrt(3 / 2 * spread) / sum(tokens))
        macs = scorers[f"chain.base.{name}"]["macs"]
        assert row["modelled_mj_float32"] == pytest.approx(macs * 4.6e-9)
        per = {"int8": 0.3, "fp16": 2.0, "lmul-7": 1.0, "lmul-3": 1.0}.get(name)
        assert row["modelled_mj"] == (None if per is None else pytest.approx(macs * per * 1e-9))
        bits = {"bf16": 16, "fp16": 16, "int4": 4, "lmul-7": 16, "lmul-3": 12}.get(name, 8)
        assert row["modelled_reading_mj"] == pytest.approx(macs * bits / 32 * 640e-9)
    assert canopy_store.verify(root, deep=True).is_empty()
    kl = {name: row["kl"] for name, row in shown.items()}
    assert kl["bf16"] < kl["e4m3"] < kl["e5m2"]


def test_options_are_scored_in_a_format_too(tmp_path, chain, canopy):
    item = {"item_id": "i", "prompt": "a b", "options": [" c", " d"], "answer": 0}
    (tmp_path / "i.jsonl").write_text(json.dumps(item))
    call = ("ingest", "options", "--store", tmp_path / "s", "--model", chain, "--family", "chain")
    call = (*call, "--variant", "base", "--task", "t", "--items", tmp_path / "i.jsonl")
    assert canopy(*call)[0] == 0
    assert canopy(*call, "--number-format", "int4")[0] == 0
    rows = canopy_store.read(tmp_path / "s", "option_scores").sort("option")
    plain, rough = (rows.filter(scorer_id=f"chain.base{n}")["logprob_sum"] for n in ("", ".int4"))
    assert not plain.equals(rough)
    assert (plain - rough).abs().max() < 1
    for name in ("int3", "lmul-1", "lmul-24", "lmul-"):
        refused(canopy(*call, "--number-format", name), 2, f"--number-format {name}", "int8", "lmul-23")
    refused(canopy(*call, "--number-format", "int8", "--dtype", "bfloat16"), 2, "leave --dtype out")
