"""One decode step of attention in one kernel: QK-norm, RoPE, append to the cache, attention over it, combine.

Not a registered operator: the runtime's fused decode step calls it directly. The key/value cache is paged; a plain
cache [slots, max_seq, ...] is the case of one page a sequence. Each (sequence, KV head) is cut into at most `splits`
runs of keys (flash decoding); the last program to finish combines them in fixed order, so results repeat bit for bit.

bf16, fp16 or float32, float32 softmax. CUDA only, or Triton's interpreter with fp16 and float32.
"""

from dataclasses import dataclass

import torch

from shardwise.ops.triton_support import interpreting, tl, triton


@triton.jit
def _rotate(first, second, cos, sin):
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _unit(first, second, weight_ptr, half, eps, HALF: tl.constexpr, ON: tl.constexpr):
    """RMS-normalise rows given as two halves of the head; identity when not ON."""
    if ON:
        scale = 1.0 / tl.sqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + eps)
        first = first * scale[:, None] * tl.load(weight_ptr + half)[None, :].to(tl.float32)
        second = second * scale[:, None] * tl.load(weight_ptr + HALF + half)[None, :].to(tl.float32)
    return first, second


@triton.jit(do_not_specialize=["splits", "scale", "eps"])
def _decode_kernel(
    qkv_ptr,  # [B, (N + 2 Nkv) D]
    k_cache_ptr,  # [pages, PAGE, Nkv, D], strided
    v_cache_ptr,  # the same, with the same strides
    table_ptr,  # int32 [rows, max_pages]
    slot_ptr,  # int32 [B], each sequence's row of the table
    position_ptr,  # int32 [B], keys already cached; negative: the row is padding
    rope_ptr,  # float32 [max_position, D]: cos of the first half, then sin; only with ROPE
    q_norm_ptr,  # [D]
    k_norm_ptr,  # [D]
    sinks_ptr,  # [N]
    out_ptr,  # [B, N D]
    partial_ptr,  # float32 [B Nkv, splits, GROUP_PAD, D + 2]
    counter_ptr,  # int32 [B Nkv], zero between calls
    kv_heads,
    max_pages,
    splits,
    page_stride,
    token_stride,
    head_stride,
    scale,
    eps,
    window,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    ROPE: tl.constexpr,
    QK_NORM: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):
    pair = tl.program_id(0)
    split = tl.program_id(1)
    sequence = pair // kv_heads
    head = pair % kv_heads
    D: tl.constexpr = 2 * HALF
    PRECISION: tl.constexpr = "ieee" if qkv_ptr.dtype.element_ty == tl.float32 else "tf32"
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    # Positions, slots and angles are constant for the whole step: they load while the kernel before drains.
    position = tl.load(position_ptr + sequence)
    slot = tl.load(slot_ptr + sequence) if SLOTS else sequence
    table = table_ptr + slot * max_pages
    half = tl.arange(0, HALF)
    whole = tl.arange(0, D)
    group = tl.arange(0, GROUP_PAD)
    live = group < GROUP
    row = qkv_ptr + sequence.to(tl.int64) * (kv_heads * (GROUP + 2) * D)
    if position < 0:
        if PDL:
            tl.extra.cuda.gdc_wait()
        if split == 0:
            place = (sequence.to(tl.int64) * kv_heads + head) * GROUP * D + group[:, None] * D + whole[None, :]
            tl.store(out_ptr + place, tl.zeros([GROUP_PAD, D], out_ptr.dtype.element_ty), mask=live[:, None])
        return

    first = 0
    if WINDOW:
        first = tl.maximum(position - window + 1, 0)
    blocks = tl.cdiv(position - first // BLOCK * BLOCK, BLOCK)
    run = tl.maximum(tl.cdiv(blocks, splits), 1)
    active = tl.maximum(tl.cdiv(blocks, run), 1)  # splits that have keys; split 0 also has the new one
    if split >= active:
        return
    cos = 1.0
    sin = 0.0
    if ROPE:
        cos = tl.load(rope_ptr + position.to(tl.int64) * D + half)[None, :]
        sin = tl.load(rope_ptr + position.to(tl.int64) * D + HALF + half)[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
    q_at = row + (head * GROUP + group[:, None]) * D + half[None, :]
    q1 = tl.load(q_at, mask=live[:, None], other=0.0).to(tl.float32)
    q2 = tl.load(q_at + HALF, mask=live[:, None], other=0.0).to(tl.float32)
    q1, q2 = _unit(q1, q2, q_norm_ptr, half, eps, HALF, QK_NORM)
    if ROPE:
        q1, q2 = _rotate(q1, q2, cos, sin)
    q1 = (q1 * scale).to(qkv_ptr.dtype.element_ty)
    q2 = (q2 * scale).to(qkv_ptr.dtype.element_ty)

    top = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    weight = tl.zeros([GROUP_PAD], tl.float32)
    total = tl.zeros([GROUP_PAD, D], tl.float32)
    if split == 0:  # this token's own key and value: rotate, store, and start the softmax with them
        k_at = row + (kv_heads * GROUP + head) * D + half[None, :]
        k1 = tl.load(k_at).to(tl.float32)
        k2 = tl.load(k_at + HALF).to(tl.float32)
        k1, k2 = _unit(k1, k2, k_norm_ptr, half, eps, HALF, QK_NORM)
        if ROPE:
            k1, k2 = _rotate(k1, k2, cos, sin)
        k1 = k1.to(k_cache_ptr.dtype.element_ty)
        k2 = k2.to(k_cache_ptr.dtype.element_ty)
        v = tl.load(row + (kv_heads * (GROUP + 1) + head) * D + whole)
        page = tl.load(table + position // PAGE).to(tl.int64)
        place = page * page_stride + position % PAGE * token_stride + head * head_stride
        tl.store(k_cache_ptr + place + half[None, :], k1)
        tl.store(k_cache_ptr + place + HALF + half[None, :], k2)
        tl.store(v_cache_ptr + place + whole, v.to(v_cache_ptr.dtype.element_ty))
        top = tl.sum(q1.to(tl.float32) * k1.to(tl.float32), 1) + tl.sum(q2.to(tl.float32) * k2.to(tl.float32), 1)
        weight += 1.0
        total += v.to(tl.float32)[None, :]

    begin = first // BLOCK * BLOCK + split * run * BLOCK
    end = tl.minimum(begin + run * BLOCK, position)
    keys = tl.arange(0, BLOCK)
    for start in range(begin, end, BLOCK):
        at = start + keys
        seen = (at < position) & (at >= first)
        page = tl.load(table + start // PAGE).to(tl.int64)
        slots = page * page_stride + (start % PAGE + keys).to(tl.int64) * token_stride + head * head_stride
        k1 = tl.load(k_cache_ptr + slots[None, :] + half[:, None], mask=seen[None, :], other=0.0)
        k2 = tl.load(k_cache_ptr + slots[None, :] + HALF + half[:, None], mask=seen[None, :], other=0.0)
        v = tl.load(v_cache_ptr + slots[:, None] + whole[None, :], mask=seen[:, None], other=0.0)
        scores = tl.dot(q1, k1, input_precision=PRECISION) + tl.dot(q2, k2, input_precision=PRECISION)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        decay = tl.where(top == float("-inf"), 0.0, tl.exp(top - new_top))
        p = tl.where(seen[None, :], tl.exp(scores - tl.where(new_top == float("-inf"), 0.0, new_top)[:, None]), 0.0)
        total = total * decay[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        weight = weight * decay + tl.sum(p, 1)
        top = new_top

    if active > 1:
        stride: tl.constexpr = GROUP_PAD * (D + 2)
        parts = partial_ptr + pair.to(tl.int64) * splits * stride
        mine = parts + split * stride
        tl.store(mine + group[:, None] * D + whole[None, :], total, mask=live[:, None])
        tl.store(mine + GROUP_PAD * D + group, top, mask=live)
        tl.store(mine + GROUP_PAD * D + GROUP_PAD + group, weight, mask=live)
        tl.debug_barrier()  # all of this program's stores come before its arrival
        arrived = tl.atomic_add(counter_ptr + pair, 1, sem="acq_rel", scope="gpu")
        if arrived != active - 1:
            return
        tl.store(counter_ptr + pair, 0)
        # First the maxima of all parts, then the parts: their loads wait for nothing, so many are on the way at once.
        other = tl.arange(0, MAX_SPLITS)
        tops = tl.load(
            parts + other[:, None] * stride + GROUP_PAD * D + group[None, :],
            mask=(other < active)[:, None] & live[None, :], other=float("-inf"), cache_modifier=".cg",
        )  # fmt: skip
        top = tl.where(live, tl.max(tops, 0), 0.0)
        weight = tl.zeros([GROUP_PAD], tl.float32)
        total = tl.zeros([GROUP_PAD, D], tl.float32)
        for part in tl.range(0, active, loop_unroll_factor=4):
            theirs = parts + part * stride
            at = theirs + group[:, None] * D + whole[None, :]
            values = tl.load(at, mask=live[:, None], other=0.0, cache_modifier=".cg")
            its_top = tl.load(theirs + GROUP_PAD * D + group, mask=live, other=0.0, cache_modifier=".cg")
            its_weight = tl.load(theirs + GROUP_PAD * D + GROUP_PAD + group, mask=live, other=1.0, cache_modifier=".cg")
            factor = tl.exp(its_top - top)
            total += values * factor[:, None]
            weight += its_weight * factor
    if SINKS:
        sink = tl.load(sinks_ptr + head * GROUP + group, mask=live, other=0.0).to(tl.float32)
        weight += tl.exp(sink - top)
    place = (sequence.to(tl.int64) * kv_heads + head) * GROUP * D + group[:, None] * D + whole[None, :]
    result = total / weight[:, None]
    tl.store(out_ptr + place, result.to(out_ptr.dtype.element_ty), mask=live[:, None])


MAX_SPLITS = 64


@dataclass(frozen=True)
class DecodeWorkspace:
    """What `fused_decode_attention` keeps between calls; one per stream, shared by all layers.

    Large enough for any batch and number of splits whose product it was made for.
    """

    partial: torch.Tensor
    counter: torch.Tensor
    splits: int

    @staticmethod
    def create(batch: int, heads: int, kv_heads: int, head_dim: int, splits: int, device) -> "DecodeWorkspace":
        """For `splits` runs of each sequence of a batch of `batch`."""
        pad = max(16, triton.next_power_of_2(heads // kv_heads))
        return DecodeWorkspace(
            torch.empty(batch * kv_heads * splits * pad * (head_dim + 2), dtype=torch.float32, device=device),
            torch.zeros(batch * splits * kv_heads, dtype=torch.int32, device=device),
            splits,
        )


def takes_head_size(size: int) -> bool:
    """A power of two from 32 to 256."""
    return 32 <= size <= 256 and not size & (size - 1)


def splits_for(batch: int, kv_heads: int, max_keys: int, processors: int, block: int = 64) -> int:
    """Runs of keys a (sequence, head) pair is cut into: enough to fill the device, none shorter than a block."""
    fill = triton.cdiv(2 * processors, batch * kv_heads)
    return max(1, min(fill, triton.cdiv(max_keys, block), MAX_SPLITS))


def fused_decode_attention(
    qkv: torch.Tensor,  # [B, (N + 2 Nkv) D], before QK-norm and RoPE
    k_cache: torch.Tensor,  # [pages, page_size, Nkv, D]
    v_cache: torch.Tensor,  # [pages, page_size, Nkv, D]
    page_table: torch.Tensor,  # int32 [B, max_pages]; with `slots` [rows, max_pages]
    positions: torch.Tensor,  # int32 [B]: keys already cached; negative marks a padding row, which yields zeros
    rope: torch.Tensor | None,  # float32 [max_position, D]: cos of the first half, then sin; None: no rotation
    workspace: DecodeWorkspace,
    *,
    heads: int,
    slots: torch.Tensor | None = None,  # int32 [B]: each sequence's row of the page table
    splits: int | None = None,
    scale: float | None = None,
    q_norm: torch.Tensor | None = None,  # [D]
    k_norm: torch.Tensor | None = None,  # [D]
    eps: float = 1e-6,
    sinks: torch.Tensor | None = None,  # [N]
    window: int | None = None,
    out: torch.Tensor | None = None,  # [B, N D]
    pdl: bool = False,
) -> torch.Tensor:
    """Attention of one new token a sequence; its key and value are appended to the cache. Returns [B, N D].

    D a power of two from 32 to 256, page_size a multiple of 64 (or of itself when smaller and a power of two),
    NeoX pairing over the whole head. The caches may be views with equal strides and contiguous heads: a plain cache
    [slots, max_seq, Nkv, D], or one of FlashInfer's [pages, 2, Nkv, page_size, D] transposed. `window` counts the keys
    seen, the new token's included. `splits` replaces the workspace's, where the product with the batch fits in it.
    """
    page_size, kv_heads, head_dim = k_cache.shape[1:]
    batch = qkv.shape[0]
    block = min(64, page_size)
    splits = workspace.splits if splits is None else splits
    if not takes_head_size(head_dim) or page_size % block or heads % kv_heads:
        raise ValueError(
            f"fused_decode_attention: head size {head_dim} (a power of two, 32 to 256), page size {page_size} "
            f"(a multiple of {block}), {heads} heads over {kv_heads} KV heads"
        )
    if k_cache.stride() != v_cache.stride() or k_cache.stride(-1) != 1:
        raise ValueError(
            f"fused_decode_attention: caches with strides {k_cache.stride()} and {v_cache.stride()}, need equal ones "
            "with contiguous heads"
        )
    if (q_norm is None) != (k_norm is None):
        raise ValueError("fused_decode_attention: q_norm and k_norm come together")
    if not 1 <= splits <= MAX_SPLITS or batch * splits * kv_heads > workspace.counter.numel():
        raise ValueError(
            f"fused_decode_attention: {splits} splits (1 to {MAX_SPLITS}) of {batch} sequences with {kv_heads} KV "
            f"heads exceed the workspace's {workspace.counter.numel()} runs"
        )
    group = heads // kv_heads
    out = qkv.new_empty(batch, heads * head_dim) if out is None else out
    pdl = pdl and not interpreting()
    _decode_kernel[(batch * kv_heads, splits)](
        qkv, k_cache, v_cache, page_table, slots, positions, rope, q_norm, k_norm, sinks, out,
        workspace.partial, workspace.counter, kv_heads, page_table.shape[1], splits, *k_cache.stride()[:3],
        head_dim**-0.5 if scale is None else scale, eps, window or 0,
        GROUP=group, GROUP_PAD=max(16, triton.next_power_of_2(group)), HALF=head_dim // 2, PAGE=page_size,
        BLOCK=block, MAX_SPLITS=MAX_SPLITS, ROPE=rope is not None, QK_NORM=q_norm is not None, SINKS=sinks is not None,
        WINDOW=bool(window), SLOTS=slots is not None, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return out
