"""The sampler's loop on a GPU: a batch of fixed size, whose step is captured once and then replayed.

A step of a small model is hundreds of short kernels, and starting each from Python takes longer than
running it. So every array of the batch keeps its size and its place in memory, where each slot stands
is known on the device, and the whole step (model, policy, draw, record) is one CUDA graph. The host
waits once a step, to hear which rollouts ended; what they logged is copied while the next step runs.

A prompt's keys and values are kept once, and read once a step for each group of a few slots that have
it. A slot's first token to be read is its prompt's last, so that no token is drawn outside the step.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from canopy_store.ingest import policy, shared_prompt
from canopy_store.ingest.draw import Job, Sampling

_GROUP = 16  # slots; with 4 query heads a key-value head, 64 rows of one product


class _Layer(CacheLayerMixin):
    """A layer's keys and values: the batch has them; this hands the step's new ones to `attend`."""

    def __init__(self, batch: Batch, number: int) -> None:
        super().__init__()
        self.batch, self.number, self.is_initialized = batch, number, True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key_states.attend = functools.partial(self.batch.attend, self.number)  # type: ignore[attr-defined]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return 0, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class Batch:
    """W slots with all that the step reads and writes, on the device, of fixed size."""

    def __init__(
        self, model: Any, sampling: Sampling, width: int, prompts: dict[int, list[int]]
    ) -> None:
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        shared = getattr(config, "num_key_value_heads", None) or heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        vocabulary = model.get_output_embeddings().weight.shape[0]
        layers, steps, device = config.num_hidden_layers, sampling.max_new_tokens, model.device
        self.model, self.sampling = model, sampling
        self.best = min(sampling.top_logprobs, sampling.top_k or vocabulary, vocabulary)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        # where each prompt's tokens stand, its last one not counted, and whether it was read
        self.ids, ends = prompts, np.cumsum([len(ids) - 1 for ids in prompts.values()])
        self.ranges = {
            j: (int(end) - len(prompts[j]) + 1, int(end)) for j, end in zip(prompts, ends, strict=True)
        }
        self.read: set[int] = set()
        # keys and values of each layer: of the prompts (heads, T, D), of the slots' own tokens
        self.prompts = zeros(layers, 2, shared, int(ends[-1]), size, dtype=model.dtype)
        self.own = zeros(layers, 2, width, shared, steps, size, dtype=model.dtype)
        groups = width // _GROUP + len(prompts) + 1
        self.order = zeros(groups, _GROUP) - 1  # the slots of each group
        self.span = zeros(2, groups)  # where the group's prompt begins, and its tokens
        self.length, self.start = zeros(width), zeros(width)  # drawn so far; where the first one stands
        self.live, self.over = zeros(width, dtype=torch.bool), zeros(width, dtype=torch.bool)
        self.last = zeros(width, dtype=torch.long)
        self.noise = zeros(width, steps, dtype=torch.float64)
        # a row for each step: token, its record, likeliest ids and log-probabilities
        columns = 1 + len(sampling.record) + 2 * self.best
        self.log = zeros(width, steps, columns, dtype=torch.float32)
        self.ends = policy.Ends(sampling.end_ids, vocabulary, device)
        self.seen = None  # the tokens of each slot, of a policy that penalises
        if sampling.penalises:
            self.seen = zeros(width, vocabulary, dtype=torch.bool)
        self.cache = Cache(layers=[_Layer(self, number) for number in range(layers)])
        self.attended = 0

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attention (W, 1, heads, D) of the step's queries (W, heads, 1, D), keys and values."""
        self.attended += 1
        own, prompts = self.own[layer], self.prompts[layer]
        if query.is_cuda:
            from canopy_store.ingest import kernels

            out = kernels.attend(
                *(query[:, :, 0], (key[:, :, 0], value[:, :, 0]), (own[0], own[1])),
                *((prompts[0], prompts[1]), self.order, *self.span, self.length, self.live, scale),
            )
            return out[:, None]
        # elsewhere in torch's words: the loop is tested where there is no GPU
        rows, room = torch.arange(len(query)), own.shape[3]
        at = self.length.clamp(max=room - 1).long()
        for kept, new in ((own[0], key), (own[1], value)):
            kept[rows, :, at] = new[:, :, 0]
        keys, values = (
            torch.cat([p.expand(len(query), -1, -1, -1), o], 2)
            for p, o in zip(prompts, own, strict=True)
        )
        first, tokens = torch.zeros(2, len(query), dtype=torch.long)
        for slots, begins, count in zip(self.order, *self.span, strict=True):
            first[slots[slots >= 0]], tokens[slots[slots >= 0]] = begins.long(), count.long()
        place = torch.arange(prompts.shape[2])
        there = (place >= first[:, None]) & (place < (first + tokens)[:, None])
        mask = torch.cat([there, torch.arange(room) <= at[:, None]], 1)[:, None, None]
        out = torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2)

    def seat(self, jobs: list[int]) -> None:
        """Says which prompt each slot has, in slot order; reads all but the last token of new ones."""
        slots: dict[int, list[int]] = {}
        for slot, j in enumerate(jobs):
            slots.setdefault(j, []).append(slot)
        order, span = np.full(self.order.shape, -1), np.zeros(self.span.shape)
        groups = [
            (j, found[at : at + _GROUP])
            for j, found in slots.items()
            for at in range(0, len(found), _GROUP)
        ]
        for number, (j, found) in enumerate(groups):
            order[number, : len(found)] = found
            span[:, number] = self.ranges[j][0], len(self.ids[j]) - 1
        self.order.copy_(_sent(order.astype(np.int32), self.order.device))
        self.span.copy_(_sent(span.astype(np.int32), self.span.device))
        for j in slots.keys() - self.read:
            self.read.add(j)
            if len(self.ids[j]) > 1:
                self._read(self.ids[j][:-1], *self.ranges[j])

    def _read(self, token_ids: list[int], begins: int, end: int) -> None:
        cache = DynamicCache()
        ids = torch.tensor([token_ids], device=self.model.device)
        self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for layer, kept in zip(cache.layers, self.prompts, strict=True):
            kept[0, :, begins:end] = layer.keys[0]  # type: ignore[index, union-attr]
            kept[1, :, begins:end] = layer.values[0]  # type: ignore[index, union-attr]

    def begin(self, slots: list[int], prompts: list[list[int]], noise: np.ndarray) -> None:
        """Gives slots to new rollouts: of each its prompt's tokens; the numbers (n, steps)."""
        last, start = [ids[-1] for ids in prompts], [len(ids) - 1 for ids in prompts]
        rows, tokens, starts = _sent(np.array([slots, last, start], dtype=np.int64), self.last.device)
        if self.seen is not None:
            for slot, ids in zip(slots, prompts, strict=True):
                self.seen[slot] = False
                self.seen[slot, ids] = True
        self.last[rows] = tokens
        self.start[rows] = starts.int()
        self.length[rows] = 0
        self.noise[rows] = _sent(noise, self.last.device)
        self.live[rows] = True

    def forward(self) -> torch.Tensor:
        """Logits (W, V) after each slot's last token."""
        self.attended = 0
        logits: torch.Tensor = self.model(
            input_ids=self.last[:, None],
            position_ids=(self.start + self.length)[:, None].long(),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        if self.attended != len(self.cache.layers):
            raise shared_prompt.not_ours(self.model)
        return logits

    def advance(self, logits: torch.Tensor) -> None:
        """Draws each live slot's next token, logs it, and says in ``over`` which slots ended."""
        steps = self.noise.shape[1]
        at = self.length.clamp(max=steps - 1)[:, None].long()
        step = policy.take_step(
            logits,
            self.sampling,
            self.ends,
            uniform=self.noise.gather(1, at)[:, 0],
            best=self.best,
            seen=self.seen,
        )
        if self.seen is not None:
            self.seen.scatter_(1, step.tokens[:, None], True)
        columns = [step.tokens.int().view(torch.float32)[:, None], step.record.T]
        if step.top is not None:
            columns += [step.top[0].int().view(torch.float32), step.top[1]]
        row = torch.cat(columns, 1)  # (W, columns of the log)
        self.log.scatter_(1, at[:, None].expand(-1, 1, row.shape[1]), row[:, None])
        self.last.copy_(step.tokens)
        self.length += self.live
        torch.logical_or(self.ends.member[step.tokens], self.length >= steps, out=self.over)
        self.over &= self.live
        self.live &= ~self.over


def _sent(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on the device; to a GPU without waiting for it."""
    found = torch.from_numpy(array)
    return (
        found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)
    )


def sample(
    model: Any,
    jobs: Sequence[Job],
    sampling: Sampling,
    missing: list[tuple[int, int]],
    keep: Callable[[int, int, np.ndarray], None],
    on_tokens: Callable[[int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> None:
    """Samples each (job, place) of ``missing``; ``keep`` gets its log (N, columns of `Batch.log`)."""
    queue = missing[::-1]
    width = min(sampling.width, len(queue))
    batch = Batch(
        model, sampling, width, {j: jobs[j].prompt_ids for j in dict.fromkeys(j for j, _ in missing)}
    )
    with fused_layers(model, width):
        step = _captured(batch, say)
        owner = [queue[-1]] * width  # (job, place) of each slot; one that rests keeps its last
        free = list(range(width))
        ended: list[tuple[tuple[int, int], int, torch.Tensor]] = []  # their logs are on the way
        length = np.zeros(width, dtype=np.int64)
        resting: set[int] = set()
        while True:
            fresh, free = free[: len(queue)], free[len(queue) :]
            resting |= set(free)
            if len(resting) == width:
                break
            if fresh:
                before = [j for j, _ in owner] if batch.read else []
                for slot in fresh:
                    owner[slot] = queue.pop()
                if before != [j for j, _ in owner]:
                    batch.seat([j for j, _ in owner])
                begun = [owner[slot] for slot in fresh]
                prompts = [jobs[j].prompt_ids for j, _ in begun]
                batch.begin(
                    fresh,
                    prompts,
                    np.stack([jobs[j].draw(jobs[j].samples[place]) for j, place in begun]),
                )
                length[fresh] = 0
            over = step()
            for found, steps, log in ended:  # what came after them is done
                keep(*found, log[:steps].numpy())
            if on_tokens:
                on_tokens(width - len(resting))
            length += 1
            free = over.nonzero()[:, 0].tolist()
            ended = [
                (owner[slot], int(length[slot]), batch.log[slot].to("cpu", non_blocking=True, copy=True))
                for slot in free
            ]
        if batch.last.is_cuda:
            torch.cuda.synchronize()
        for found, steps, log in ended:
            keep(*found, log[:steps].numpy())


def _captured(batch: Batch, say: Callable[[str], None] | None) -> Callable[[], torch.Tensor]:
    """A step of the batch: a call takes it, and gives which slots ended (W,), on the host."""
    if not batch.last.is_cuda:

        def plain() -> torch.Tensor:
            batch.advance(batch.forward())
            return batch.over

        return plain
    # top-p asks the device whether its short way will do, which no graph can
    whole = batch.sampling.top_p == 1
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # no slot is live: what needs compiling is, and nothing changes
        for _ in range(2):
            batch.advance(batch.forward())
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    host = torch.zeros(len(batch.last), dtype=torch.bool, pin_memory=True)
    logits: list[torch.Tensor] = []
    try:
        with torch.cuda.graph(graph):
            logits = [batch.forward()]
            if whole:
                batch.advance(logits[0])
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # a model that asks the device something within a step
        torch.cuda.synchronize()
        if say:
            say(f"the step is not captured, and slower for it: {' '.join(str(error).split())[:200]}")
        logits = []

    def step() -> torch.Tensor:
        if logits:
            graph.replay()
        if not logits or not whole:
            batch.advance(logits[0] if logits else batch.forward())
        host.copy_(batch.over, non_blocking=True)
        torch.cuda.current_stream().synchronize()  # the one wait
        return host

    return step


@contextlib.contextmanager
def fused_layers(model: Any, width: int) -> Iterator[None]:
    """Inside, a step has fewer kernels: norms, rotary positions and activations fused, q, k, v as one.

    torch's compiler fuses the first three; the weights of q, k and v are laid side by side meanwhile.
    """
    rotaries: dict[Any, Any] = {}
    changed: list[Any] = []
    joined: list[list[Any]] = []
    try:
        if FUSE and model.device.type == "cuda":
            # the compiler's advice for float32, which would round what is logged to 10 bits
            warnings.filterwarnings("ignore", "TensorFloat32", UserWarning)
            for file in {sys.modules[type(module).__module__] for module in model.modules()}:
                if rotary := getattr(file, "apply_rotary_pos_emb", None):
                    rotaries[file] = rotary
                    file.apply_rotary_pos_emb = _one_kernel(rotary, width)  # type: ignore[attr-defined]
            compiled: dict[type, Any] = {}
            for module in model.modules():
                kind = type(module)
                if kind.__name__.endswith(("RMSNorm", "MLP")) and "forward" not in module.__dict__:
                    if kind not in compiled:
                        compiled[kind] = _one_kernel(kind.forward, width)
                    module.forward = functools.partial(compiled[kind], module)
                    changed.append(module)
                parts = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj")]
                if _joinable(parts):
                    _join(parts, width)
                    joined.append(parts)
        # each width and number format is a kernel of its own, which is no sign of anything wrong
        with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024):
            yield
    finally:
        for file, rotary in rotaries.items():
            file.apply_rotary_pos_emb = rotary
        for module in changed:
            del module.forward
        for parts in joined:
            _part(parts)


def _joinable(parts: Sequence[Any]) -> bool:
    """Whether these are plain linear layers, of one number format and place, with a bias all or none."""
    if not all(type(part) is torch.nn.Linear and "forward" not in part.__dict__ for part in parts):
        return False
    first = parts[0].weight
    return all(
        (part.weight.dtype, part.weight.device, part.in_features, part.bias is None)
        == (first.dtype, first.device, parts[0].in_features, parts[0].bias is None)
        for part in parts
    )


def _join(parts: Sequence[Any], width: int) -> None:
    """Lets linear layers of one input be one product, which the first of them does for all.

    The layers' own weights become views of it, so that no memory is taken.
    """
    sizes = [part.out_features for part in parts]
    with torch.inference_mode(False), torch.no_grad():  # tensors that training can use again
        weight = torch.cat([part.weight for part in parts])
        for part, own in zip(parts, weight.split(sizes), strict=True):
            part.weight.data = own
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
    done: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def forward(number: int, x: torch.Tensor) -> torch.Tensor:
        if len(x) == width > 1 and number == 0:
            outs = torch.nn.functional.linear(x, weight, bias).split(sizes, -1)
            done.update({n: (x, out) for n, out in enumerate(outs)})
        of, out = done.pop(number, (None, None))
        if of is x and out is not None:
            return out
        return torch.nn.functional.linear(x, parts[number].weight, parts[number].bias)

    for number, part in enumerate(parts):
        part.forward = functools.partial(forward, number)


def _part(parts: Sequence[Any]) -> None:
    """Gives layers that were joined weights of their own again."""
    for part in parts:
        del part.forward
    with torch.inference_mode(False), torch.no_grad():
        for part in parts:
            part.weight.data = part.weight.clone()


FUSE = True


def _one_kernel(function: Callable[..., Any], width: int) -> Callable[..., Any]:
    """The function, compiled for a step of so many slots; as it is for what reads a prompt."""
    compiled = torch.compile(function, dynamic=False)

    def call(*args: Any, **kwargs: Any) -> Any:
        states = next(x for x in args if isinstance(x, torch.Tensor))
        return (compiled if len(states) == width > 1 else function)(*args, **kwargs)

    return call
