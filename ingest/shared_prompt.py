"""Decoding many rollouts over one copy of each prompt's keys and values.

The rollouts of a prompt differ only in what they generated. So a prompt is read once and its keys and
values are kept once; each slot of the batch keeps those of its own tokens. A step's attention is one
product of all of a prompt's queries with its keys, one of each slot's query with its own, and a softmax
over both: exact, and the prompt is read from memory once a step instead of once a rollout.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from canopy_store.errors import CanopyError

NAME = "canopy_shared_prompt"
GROWTH = 64  # tokens by which the slots' room grows
_NARROW = 12  # slots below which a product is quicker from activations by row
_BLOCK = 1024  # outputs of a product that are turned round while they are in the processor's cache


@dataclass
class Prompt:
    """A prompt that was read: per layer keys and values (heads, T, D); the next token's logits (V,)."""

    length: int
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    logits: torch.Tensor


@dataclass
class _Step:
    """Where the step under way stands. The cache's layers hold it, and hand it on with their keys."""

    filled: int = 0  # own tokens of the longest slot
    at: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))  # (W,)
    unused: torch.Tensor = field(default_factory=lambda: torch.zeros(0))  # (W, filled): not reached yet
    lines: torch.Tensor | None = None  # (W * heads,): where the step's keys and values go
    groups: list[tuple[Prompt, slice | torch.Tensor]] = field(default_factory=list)  # and their slots
    layers: int = 0  # whose attention is done


class _Own(CacheLayerMixin):
    """Keys and values of the slots' own tokens (W, heads, room, D), each filled up to its position."""

    def __init__(self, step: _Step) -> None:
        super().__init__()
        self.step = step

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # zeros: a row nobody has written yet must not be NaN where its weight is 0
        self.keys = key_states.new_zeros(*key_states.shape[:2], 0, key_states.shape[-1])
        self.values = value_states.new_zeros(*value_states.shape[:2], 0, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        step = self.step
        missing = -(-step.filled // GROWTH) * GROWTH - self.keys.shape[2]
        if missing > 0:
            self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, missing))
            self.values = torch.nn.functional.pad(self.values, (0, 0, 0, missing))
        if step.lines is None:  # the same in every layer
            width, heads, room, _ = self.keys.shape
            first = torch.arange(width * heads, device=step.at.device) * room
            step.lines = first + step.at.repeat_interleave(heads)
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            kept.view(-1, kept.shape[-1]).index_copy_(0, step.lines, new.reshape(-1, new.shape[-1]))
        keys = self.keys[:, :, : step.filled]
        keys.step = step  # type: ignore[attr-defined]  # `_attend` gets the very tensor
        return keys, self.values[:, :, : step.filled]

    def keep(self, rows: torch.Tensor) -> None:
        """Drops all slots but these."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length(), 0

    def get_seq_length(self) -> int:
        return self.step.filled

    def get_max_length(self) -> int:
        return -1


class Slots:
    """The batch: W slots, each with a prompt and a position among its own tokens."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.lengths = torch.zeros(0, dtype=torch.long)  # (W,): tokens of each slot's prompt
        self.now = _Step()
        layers = model.config.get_text_config().num_hidden_layers
        self.cache = Cache(layers=[_Own(self.now) for _ in range(layers)])

    def read(self, token_ids: list[int]) -> Prompt:
        """Reads a prompt: its keys, values and the logits of what follows."""
        ids = torch.tensor([token_ids], device=self.model.device)
        cache = DynamicCache()
        logits = self.model(
            input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[0, -1]
        layers = [(layer.keys[0], layer.values[0]) for layer in cache.layers]  # type: ignore
        return Prompt(len(token_ids), layers, logits)

    def seat(self, prompts: list[Prompt]) -> None:
        """Says which prompt each slot has, in slot order."""
        rows: dict[int, list[int]] = {}
        for slot, prompt in enumerate(prompts):
            rows.setdefault(id(prompt), []).append(slot)
        first = {id(prompt): prompt for prompt in prompts}
        device = self.model.device
        self.now.groups = []
        for key, found in rows.items():
            side_by_side = found[-1] - found[0] + 1 == len(found)  # read in place, not gathered
            slots = (
                slice(found[0], found[-1] + 1) if side_by_side else torch.tensor(found, device=device)
            )
            self.now.groups.append((first[key], slots))
        self.lengths = torch.tensor([prompt.length for prompt in prompts], device=device)

    def keep(self, rows: torch.Tensor) -> None:
        """Drops all slots but these; `seat` must follow."""
        for layer in self.cache.layers:
            layer.keep(rows)  # type: ignore[union-attr]

    def step(self, tokens: torch.Tensor, at: np.ndarray) -> torch.Tensor:
        """Logits (W, V) after each slot's token (W,), which is its own at position ``at`` (W,)."""
        now = self.now
        now.at, now.filled = torch.from_numpy(at).to(tokens.device), int(at.max()) + 1
        now.unused = torch.arange(now.filled, device=tokens.device)[None] > now.at[:, None]
        now.lines, now.layers = None, 0
        # by column, as `_linear` leaves every activation: sums of both run over memory in order
        embedded = self.model.get_input_embeddings()(tokens).t().contiguous().t()[:, None]  # (W, 1, d)
        out = self.model(
            inputs_embeds=embedded,
            position_ids=(self.lengths + now.at)[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        if now.layers != len(self.cache.layers):
            raise not_ours(self.model)
        return out.logits[:, -1].contiguous()


def not_ours(model: Any) -> CanopyError:
    """The error where a model's attention was not given the keys that the cache gave."""
    return CanopyError(
        f"transformers {transformers.__version__}: the attention of "
        f"{model.config.model_type} does not get the cache's own keys; install another"
    )


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention (W, 1, H, D) of each slot's query (W, H, 1, D) over its prompt and its own tokens."""
    captured = getattr(key, "attend", None)
    if captured is not None:  # the loop of `canopy_store.ingest.captured`
        return captured(query, key, value, scaling or query.shape[-1] ** -0.5), None
    step: _Step | None = getattr(key, "step", None)
    if step is None:  # reading a prompt
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    width, heads, _, size = query.shape
    shared = key.shape[1]  # key-value heads; each serves heads / shared query heads
    q = query.reshape(width, shared, heads // shared, size) * (scaling or size**-0.5)
    own = q @ key.transpose(2, 3)  # (W, shared, heads/shared, filled)
    own.masked_fill_(step.unused[:, None, None, :], -torch.inf)
    out = torch.empty(*q.shape[:3], value.shape[-1], dtype=value.dtype, device=value.device)
    weights = torch.empty_like(own)
    for prompt, rows in step.groups:
        keys, values = prompt.layers[module.layer_idx]  # (shared, T, D)
        mine = q[rows].transpose(0, 1)  # (shared, n, heads/shared, D)
        n = mine.shape[1]
        scores = mine.reshape(shared, -1, size) @ keys.transpose(1, 2)
        scores = scores.view(shared, n, -1, prompt.length).transpose(0, 1)
        both = torch.cat([scores, own[rows]], -1).softmax(-1, dtype=torch.float32).to(value.dtype)
        weights[rows] = both[..., prompt.length :]
        onto = both[..., : prompt.length].transpose(0, 1).reshape(shared, -1, prompt.length)
        out[rows] = (onto @ values).view(shared, n, -1, values.shape[-1]).transpose(0, 1)
    out += weights @ value
    step.layers += 1
    return out.reshape(width, 1, heads, -1), None


AttentionInterface.register(NAME, _attend)


@contextlib.contextmanager
def weights_first(model: Any) -> Iterator[None]:
    """Inside, a decoding step's linear layers multiply weights by activations, on the CPU.

    The usual order has the batch as the product's rows: too few for every core to get a good share.
    """
    layers = []
    if model.device.type == "cpu":
        layers = [module for module in model.modules() if type(module) is torch.nn.Linear]
    for layer in layers:
        layer.forward = functools.partial(_linear, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _linear(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """What ``layer`` gives for ``x`` (W, 1, d); for any other shape it is left to torch."""
    if x.ndim != 3 or x.shape[1] != 1 or len(x) < 2:
        return torch.nn.functional.linear(x, layer.weight, layer.bias)
    columns = (x[:, 0].contiguous() if len(x) < _NARROW else x[:, 0]).t()  # (d, W)
    if layer.bias is None and layer.out_features > 16 * _BLOCK:  # the vocabulary's, wanted by row
        out = x.new_empty(len(x), layer.out_features)
        for block, part in zip(out.split(_BLOCK, 1), layer.weight.split(_BLOCK), strict=True):
            block.copy_((part @ columns).t())
        return out[:, None]
    if layer.bias is None:
        out = layer.weight @ columns
    else:
        out = torch.addmm(layer.bias[:, None], layer.weight, columns)
    return out.t()[:, None]


def prepare(model: Any) -> bool:
    """Whether the model can share prompts; if so its attention is set to do it.

    Needs plain attention over all that went before, through transformers' attention interface: no
    sliding window, no soft cap, no attention sinks, no state-space layers.
    """
    config = model.config.get_text_config()
    if config._attn_implementation == NAME:
        return True
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    plain = (
        kinds == {"full_attention"}
        and not (getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True))
        and not getattr(config, "attn_logit_softcapping", None)
        and config.model_type in _PLAIN
    )
    if plain and config._attn_implementation in ("sdpa", "eager"):
        model.set_attn_implementation(NAME)
        return True
    return False


# Families whose attention is q, k, v, rotary positions and a softmax, and nothing else.
_PLAIN = frozenset(
    [
        "llama",
        "qwen2",
        "qwen3",
        "mistral",
        "smollm3",
        "olmo",
        "olmo2",
        "phi3",
        "gemma",
        "granite",
        "starcoder2",
        "stablelm",
        "gpt_neox",
    ]
)
