"""What the sampler computes by its own kernels on a GPU, in Triton: a step's attention, a policy's sums.

Attention: the rollouts of a prompt share one copy of its keys and values, so a prompt is read from
memory once for each block of slots, and each slot then goes on over its own tokens, only as many as it
has. Policy: entropy, log-probabilities and the draw follow from three sums a block of the vocabulary,
which one pass over the logits gives; they are never whole in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024  # tokens of the vocabulary that one program sums over
# keys that are read at once, and how a program is built: of 26 tried on an H200 the fastest, or near
_PROMPT = {"TILE": 64, "num_warps": 4, "num_stages": 2}
_OWN = {"TILE": 32, "num_warps": 2, "num_stages": 2}


def _power(n: int, least: int = 1) -> int:
    """The power of two that is at least ``n``, and at least ``least``."""
    return max(least, triton.next_power_of_2(max(n, 1)))


# ---------------------------------------------------------------- attention


@triton.jit
def _over_prompt(
    Q,  # (W, H * R, D)
    K,  # (H, T, D), prompt after prompt
    V,
    ACC,  # (W, H * R, D) float32: the weighted sum of values, not divided yet
    PEAK,  # (W, H * R) float32: the largest score
    SUM,  # (W, H * R) float32: the sum of exp(score - peak)
    order,  # (blocks, G): slots of one prompt a block, -1 where there is none
    first,  # (blocks,): where the block's prompt begins
    tokens,  # (blocks,): and how many it has
    scale,
    T,
    H: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    D2: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    block = tl.program_id(0)
    head = tl.program_id(1)
    if tl.load(order + block * G) < 0:
        return
    n = tl.load(tokens + block)
    row = tl.arange(0, ROWS)
    d = tl.arange(0, D2)
    slot = tl.load(order + block * G + row // R, mask=row < G * R, other=-1).to(tl.int64)
    real = slot >= 0
    line = slot * (H * R) + head * R + row % R
    q = tl.load(Q + line[:, None] * D + d[None, :], mask=real[:, None] & (d[None, :] < D), other=0.0)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D2), tl.float32)
    base = (head.to(tl.int64) * T + tl.load(first + block)) * D
    for start in range(0, n, TILE):
        col = start + tl.arange(0, TILE)
        inside = (col[:, None] < n) & (d[None, :] < D)
        k = tl.load(K + base + col[:, None] * D + d[None, :], mask=inside, other=0.0)
        v = tl.load(V + base + col[:, None] * D + d[None, :], mask=inside, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(col[None, :] < n, score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        shrink = tl.exp(peak - higher)
        weight = tl.exp(score - higher[:, None])
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        peak = higher
    tl.store(ACC + line[:, None] * D + d[None, :], acc, mask=real[:, None] & (d[None, :] < D))
    tl.store(PEAK + line, peak, mask=real)
    tl.store(SUM + line, total, mask=real)


@triton.jit
def _over_own(
    Q,  # (W, H * R, D)
    NEW_K,  # (W, H, D): of the step's token, slots `line_k` and `line_v` apart
    NEW_V,
    K,  # (W, H, room, D)
    V,
    ACC,
    PEAK,
    SUM,
    OUT,  # (W, H * R, D)
    length,  # (W,): own tokens before the step's
    live,  # (W,)
    scale,
    room,
    line_k,
    line_v,
    H: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    D2: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    if tl.load(live + slot) == 0:
        return
    n = tl.load(length + slot)
    row = tl.arange(0, ROWS)
    d = tl.arange(0, D2)
    real = row < R
    whole = real[:, None] & (d[None, :] < D)
    line = slot * (H * R) + head * R + row
    q = tl.load(Q + line[:, None] * D + d[None, :], mask=whole, other=0.0)
    acc = tl.load(ACC + line[:, None] * D + d[None, :], mask=whole, other=0.0)
    peak = tl.load(PEAK + line, mask=real, other=float("-inf"))
    total = tl.load(SUM + line, mask=real, other=0.0)
    base = (slot * H + head) * room * D
    # the step's own token: kept, and attended to from here, so that nothing waits for the store
    k = tl.load(NEW_K + slot * line_k + head * D + d, mask=d < D, other=0.0)
    v = tl.load(NEW_V + slot * line_v + head * D + d, mask=d < D, other=0.0)
    tl.store(K + base + n * D + d, k, mask=d < D)
    tl.store(V + base + n * D + d, v, mask=d < D)
    score = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale
    higher = tl.maximum(peak, score)
    shrink = tl.exp(peak - higher)
    weight = tl.exp(score - higher)
    total = total * shrink + weight
    acc = acc * shrink[:, None] + weight[:, None] * v.to(tl.float32)[None, :]
    peak = higher
    for start in range(0, n, TILE):
        col = start + tl.arange(0, TILE)
        inside = (col[:, None] < n) & (d[None, :] < D)
        keys = tl.load(K + base + col[:, None] * D + d[None, :], mask=inside, other=0.0)
        values = tl.load(V + base + col[:, None] * D + d[None, :], mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(col[None, :] < n, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        shrink = tl.exp(peak - higher)
        weights = tl.exp(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        peak = higher
    out = acc / total[:, None]
    tl.store(OUT + line[:, None] * D + d[None, :], out.to(OUT.dtype.element_ty), mask=whole)


def attend(
    query: torch.Tensor,
    new: tuple[torch.Tensor, torch.Tensor],
    own: tuple[torch.Tensor, torch.Tensor],
    prompts: tuple[torch.Tensor, torch.Tensor],
    order: torch.Tensor,
    first: torch.Tensor,
    tokens: torch.Tensor,
    length: torch.Tensor,
    live: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention (W, heads, D) of each slot's token over its prompt, its own tokens and itself.

    The token's keys and values are added to the slot's own. Rows of slots that rest are undefined.

    Parameters
    ----------
    query : (W, heads, D)
    new : keys and values (W, H, D) of the tokens
    own : keys and values (W, H, room, D)
    prompts : keys and values (H, T, D), prompt after prompt
    order : (blocks, G) int32, every live slot once, each block's of one prompt; -1 where there is none
    first, tokens : (blocks,) int32, where the block's prompt begins among the T, and how many it has
    length : (W,) int32, how many of the room each slot has
    live : (W,) bool
    """
    width, heads, size = query.shape
    shared, room = own[0].shape[1:3]
    each, (blocks, group) = heads // shared, order.shape
    query = query.contiguous()
    keys, values = (x if x.stride()[1:] == (size, 1) else x.contiguous() for x in new)
    acc = torch.empty(width, heads, size, dtype=torch.float32, device=query.device)
    peak, total = torch.empty(2, width, heads, dtype=torch.float32, device=query.device)
    out = torch.empty_like(query)
    over, size2 = {"H": shared, "R": each, "D": size}, _power(size, 16)
    _over_prompt[(blocks, shared)](
        *(query, *prompts, acc, peak, total, order, first, tokens, scale, prompts[0].shape[1]),
        **over,
        G=group,
        D2=size2,
        ROWS=_power(group * each, 16),
        **_PROMPT,
    )
    _over_own[(width, shared)](
        *(query, keys, values, *own, acc, peak, total, out, length, live, scale, room),
        *(keys.stride(0), values.stride(0)),
        **over,
        D2=size2,
        ROWS=_power(each, 16),
        **_OWN,
    )
    return out


# ---------------------------------------------------------------- the policy


@triton.jit
def _block_sums(
    X,  # (B, V), rows `line` apart
    SUMS,  # (3, B, blocks) float32: peak m, sum of e = exp(x - m), sum of (x - m) e
    line,
    size,
    temperature,
    blocks,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + row * line + at, mask=at < size, other=float("-inf")).to(tl.float32) / temperature
    peak = tl.max(x, 0)
    below = x - tl.where(peak == float("-inf"), 0.0, peak)
    e = tl.exp(below)  # a NaN, or an infinity less itself, stays visible in this sum
    here = SUMS + row * blocks + block
    all_rows = tl.num_programs(0).to(tl.int64) * blocks
    tl.store(here, peak)
    tl.store(here + all_rows, tl.sum(e, 0))
    tl.store(here + 2 * all_rows, tl.sum(tl.where(e > 0, below * e, 0.0), 0))


@triton.jit
def _find(mass, uniform, index):
    """The index where ``uniform`` falls in the cumulative ``mass`` (float64), and how far inside it."""
    total = tl.sum(mass, 0)
    cumulative = tl.cumsum(mass, 0)
    target = tl.minimum(uniform * total, total * (1 - 1.1102230246251565e-16))
    found = tl.sum((cumulative <= target).to(tl.int32), 0)
    here = tl.sum(tl.where(index == found, mass, 0.0), 0)
    before = tl.sum(tl.where(index == found, cumulative, 0.0), 0) - here
    return found, tl.maximum((target - before) / here, 0.0)


@triton.jit
def _from_sums(
    X,
    SUMS,
    TOKEN,  # (B,) int64: given, or drawn
    UNIFORM,  # (B,) float64, where drawn
    ENDS,  # (ends,) int64
    RECORD,  # (4, B) float32: logprob, entropy, eos_logprob, log of the sum of exp
    line,
    size,
    temperature,
    blocks,
    ends,
    DRAW: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    ENDS2: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    index = tl.arange(0, BLOCKS)
    here, all_rows = SUMS + row * blocks + index, rows.to(tl.int64) * blocks
    peaks = tl.load(here, mask=index < blocks, other=float("-inf"))
    sums = tl.load(here + all_rows, mask=index < blocks, other=0.0)
    means = tl.load(here + 2 * all_rows, mask=index < blocks, other=0.0)
    peak = tl.max(peaks, 0)
    shrink = tl.exp(peaks - peak)
    mass = (sums * shrink).to(tl.float64)
    total = tl.sum(mass, 0)
    mean = tl.sum(tl.where(shrink > 0, (means + sums * (peaks - peak)) * shrink, 0.0).to(tl.float64), 0)
    log_total = tl.log(total)
    log_sum = peak.to(tl.float64) + log_total
    if DRAW:
        block, inside = _find(mass, tl.load(UNIFORM + row), index)
        within = tl.arange(0, BLOCK)
        at = block * BLOCK + within
        x = (
            tl.load(X + row * line + at, mask=at < size, other=float("-inf")).to(tl.float32)
            / temperature
        )
        column, _ = _find(tl.exp(x - tl.max(x, 0)).to(tl.float64), inside, within)
        token = tl.minimum(block * BLOCK + column, size - 1).to(tl.int64)
        tl.store(TOKEN + row, token)
    else:
        token = tl.load(TOKEN + row)
    chosen = tl.load(X + row * line + token).to(tl.float32) / temperature
    end = tl.arange(0, ENDS2)
    which = tl.load(ENDS + end, mask=end < ends, other=0)
    last = tl.load(X + row * line + which, mask=end < ends, other=float("-inf")).to(tl.float32)
    last = last / temperature
    highest = tl.max(last, 0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    ending = highest.to(tl.float64) + tl.log(tl.sum(tl.exp(last - highest).to(tl.float64), 0)) - log_sum
    entropy = log_total - mean / total
    logprob = chosen.to(tl.float64) - log_sum
    # a comparison with NaN is false: what is no number stays none
    tl.store(RECORD + row, tl.where(logprob > 0, 0.0, logprob).to(tl.float32))
    tl.store(RECORD + rows + row, tl.where(entropy < 0, 0.0, entropy).to(tl.float32))
    tl.store(RECORD + 2 * rows + row, tl.where(ending > 0, 0.0, ending).to(tl.float32))
    tl.store(RECORD + 3 * rows + row, log_sum.to(tl.float32))


def softmax_steps(
    logits: torch.Tensor,
    temperature: float,
    ends: torch.Tensor,
    uniform: torch.Tensor | None = None,
    tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B,), and (4, B) float32: logprob, entropy, eos_logprob, log Σ exp, of softmax(logits / T).

    As `canopy_store.ingest.policy.Policy` gives them, by one pass over the logits.

    Parameters
    ----------
    logits : (B, V) of any float type
    temperature : above 0
    ends : (ends,) int64, the ids of the end tokens
    uniform, tokens : (B,) numbers in [0, 1) by which tokens are drawn; or the tokens, int64
    """
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    rows, size = logits.shape
    blocks = triton.cdiv(size, _BLOCK)
    sums = torch.empty(3, rows, blocks, dtype=torch.float32, device=logits.device)
    record = torch.empty(4, rows, dtype=torch.float32, device=logits.device)
    token = torch.empty(rows, dtype=torch.int64, device=logits.device) if tokens is None else tokens
    line = logits.stride(0)
    _block_sums[(rows, blocks)](logits, sums, line, size, float(temperature), blocks, BLOCK=_BLOCK)
    _from_sums[(rows,)](
        *(logits, sums, token, record if uniform is None else uniform, ends, record),
        *(line, size, float(temperature), blocks, len(ends)),
        DRAW=tokens is None,
        BLOCK=_BLOCK,
        BLOCKS=_power(blocks),
        ENDS2=_power(len(ends)),
    )
    return token, record


# ---------------------------------------------------------------- is it right here


def check(device: torch.device) -> None:
    """Raises ArithmeticError where a kernel's numbers on this device are not those of float64."""
    numbers = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=numbers)

    logits = 3 * normal(5, 2 * _BLOCK + 77)
    uniform = torch.rand(5, generator=numbers, dtype=torch.float64)
    ends = torch.tensor([1, 2000])
    token, record = softmax_steps(logits.to(device), 0.7, ends.to(device), uniform=uniform.to(device))
    token, record = token.cpu(), record.cpu().double()
    log = (logits.double() / 0.7).log_softmax(-1)
    want = [
        log.gather(1, token[:, None])[:, 0],
        -(log.exp() * log).sum(-1),
        log[:, ends].logsumexp(-1),
    ]
    above = log.exp().cumsum(-1).gather(1, token[:, None])[:, 0]
    nearest = torch.minimum(torch.maximum(uniform, above - want[0].exp()), above)
    _agree("policy", record[:3], torch.stack(want), 1e-4)
    _agree("draw", nearest, uniform, 1e-5)

    width, heads, shared, size, room, prompt = 6, 4, 2, 64, 70, 130
    query, length = normal(width, heads, size), torch.tensor([0, 1, 5, 64, 65, 69], dtype=torch.int32)
    new, own, kept = (
        [normal(*shape, size) for _ in range(2)]
        for shape in ((width, shared), (width, shared, room), (shared, prompt))
    )
    order = torch.full((2, 16), -1, dtype=torch.int32)
    order[0, :3], order[1, :3] = torch.arange(3), torch.arange(3, 6)
    first, count = torch.tensor([[0, 100], [100, 30]], dtype=torch.int32)
    new_there, own_there, kept_there = ((x[0].to(device), x[1].to(device)) for x in (new, own, kept))
    got = attend(
        query.to(device),
        new_there,
        own_there,
        kept_there,
        *(order.to(device), first.to(device), count.to(device), length.to(device)),
        torch.ones(width, dtype=torch.bool, device=device),
        size**-0.5,
    ).cpu()
    for slot in range(width):
        begins, n = 100 * (slot // 3), int(length[slot])
        end = begins + int(count[slot // 3])
        keys, values = (
            torch.cat([kept[i][:, begins:end], own[i][slot, :, :n], new[i][slot][:, None]], 1).double()
            for i in range(2)
        )
        rows = query[slot].double().view(shared, -1, size)
        weights = ((rows @ keys.transpose(1, 2)) * size**-0.5).softmax(-1)
        _agree("attention", got[slot], (weights @ values).view(heads, size), 1e-4)


def _agree(what: str, got: torch.Tensor, want: torch.Tensor, within: float) -> None:
    error = (got.double() - want.double()).abs().max().item()
    if not error <= within:
        raise ArithmeticError(f"{what} is {error:.1e} from float64, more than {within:.0e}")
