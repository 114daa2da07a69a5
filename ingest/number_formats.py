"""Number formats emulated in a model's linear layers: what fewer bits or cheaper products do to it.

Weights and inputs of every linear layer, the head included, are rounded to the format and multiplied;
products are added in float32, and all between the layers stays as it is. That says what a format does
to the numbers, not how fast or how thrifty a device is: nothing here is quicker.

    bf16, fp16      rounded to nearest
    e4m3, e5m2      fp8, scaled so that the largest of a weight's row, or a token's input, is that of fp8
    int8            symmetric: weights scaled a row, inputs a token
    int4            weights alone, symmetric, scaled for each 32 inputs of a row; inputs as they are
    lmul-M          L-Mul at M bits of mantissa, 2 to 23: 1 + x + y + 2^-l(M) for the product of two
                    mantissas 1 + x and 1 + y, by one addition of the bits (arXiv 2410.00907)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from canopy_store.errors import UsageError

_ROUNDED = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_GROUP = 32  # inputs that share a scale in int4
_BLOCK = 1 << 17  # products that L-Mul makes at once: they stay in a core's cache


class Emulation:
    """A model's linear layers in a number format, while `on`.

    Parameters
    ----------
    model : in float32; it is left as it is, and its weights are held once more
    name : of the format

    Attributes
    ----------
    macs : multiply-accumulates a token of these layers

    Raises
    ------
    UsageError
        The model is not in float32, or has no linear layer.
    """

    def __init__(self, model: Any, name: str) -> None:
        if model.dtype != torch.float32:
            raise UsageError(f"--number-format {name}: is emulated in float32; leave --dtype out")
        layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D)]
        if not layers:
            raise UsageError(f"--number-format {name}: {type(model).__name__} has no linear layer")
        self.macs = sum(layer.weight.numel() for layer in layers)
        self.layers = [(layer, _forward(layer, name)) for layer in layers]

    @contextmanager
    def on(self) -> Iterator[None]:
        """The linear layers compute in the format until the block ends."""
        for layer, forward in self.layers:
            layer.forward = forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            for layer, _ in self.layers:
                del layer.forward


def _forward(layer: Any, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    stored = layer.weight.detach()
    weight = rounded_weights(stored.T if isinstance(layer, Conv1D) else stored, name)

    def forward(x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = product(rows, weight, name).reshape(*x.shape[:-1], -1)
        return out if layer.bias is None else out + layer.bias

    return forward


def rounded_weights(weight: torch.Tensor, name: str) -> torch.Tensor:
    """Weights (m, k) as the format holds them, float32; those of L-Mul are rounded in its product."""
    if name == "int4":
        rows, width = weight.shape
        padded = torch.nn.functional.pad(weight, (0, -width % _GROUP)).reshape(rows, -1, _GROUP)
        return _integers(padded, 7).reshape(rows, -1)[:, :width]
    return rounded(weight, name)


def rounded(x: torch.Tensor, name: str) -> torch.Tensor:
    """Inputs (n, k) as the format holds them, float32, each row with a scale of its own."""
    if name in _ROUNDED:
        return x.to(_ROUNDED[name]).float()
    if name in _FP8:
        scale = _largest(x) / torch.finfo(_FP8[name]).max
        return (x / scale).to(_FP8[name]).float() * scale
    return _integers(x, 127) if name == "int8" else x


def _integers(x: torch.Tensor, most: int) -> torch.Tensor:
    scale = _largest(x) / most
    return (x / scale).round() * scale


def _largest(x: torch.Tensor) -> torch.Tensor:
    return x.abs().amax(-1, keepdim=True).clamp_min(1e-30)


def product(x: torch.Tensor, weight: torch.Tensor, name: str) -> torch.Tensor:
    """Inputs (n, k) times the weights (m, k) that `rounded_weights` gave: (n, m), float32."""
    if name.startswith("lmul-"):
        return l_mul(x, weight, int(name.removeprefix("lmul-")))
    return rounded(x, name) @ weight.T


def l_mul(x: torch.Tensor, weight: torch.Tensor, bits: int) -> torch.Tensor:
    """x (n, k) times weight (m, k) by L-Mul, added in float32: (n, m).

    The exponents and mantissas of two numbers are added as one integer; a sum of mantissas above 1
    carries into the exponent. The signs' bits add to the sign of the product.
    """
    extra = bits if bits <= 3 else 3 if bits == 4 else 4
    left = _mantissa(x, bits) - (0x3F800000 - (1 << (23 - extra)))
    right = _mantissa(weight, bits)
    out = torch.empty(len(x), len(weight), device=x.device)
    each = max(1, _BLOCK // max(1, x.shape[1]))  # pairs of rows at once
    height = min(len(x), 8)
    width = max(1, each // height)
    for i in range(0, len(x), height):
        for j in range(0, len(weight), width):
            bits_of = left[i : i + height, None] + right[None, j : j + width]
            out[i : i + height, j : j + width] = bits_of.view(torch.float32).sum(-1)
    return out


def _mantissa(x: torch.Tensor, bits: int) -> torch.Tensor:
    """The bits of x (int32) with so many of mantissa, rounded to nearest; 0 is the least that stays."""
    x = torch.where(x == 0, 1e-18, x).abs().clamp(1e-18, 1e18).copysign(x).float().contiguous()
    raw = x.view(torch.int32)
    if bits == 23:
        return raw
    return (raw + (1 << (22 - bits))) & ~((1 << (23 - bits)) - 1)
