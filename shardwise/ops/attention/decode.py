"""One decode step of attention in one kernel: QK-norm, RoPE, append to the cache, attention over it, combine.

Not a registered operator: the runtime's fused decode step calls it directly. The key/value cache is paged; a plain
cache [slots, max_seq, ...] is the case of one page a sequence. Each (sequence, KV head) is cut into at most `splits`
runs of keys (flash decoding); the last program to finish combines them in fixed order, so results repeat bit for bit.

bf16, fp16 or float32, float32 softmax. CUDA only, or Triton's interpreter with fp16 and float32.
"""

from dataclasses import dataclass

import torch

from shardwise.ops.attention.decode_direct import direct_kernel
from shardwise.ops.attention.decode_kernel import decode_kernel
from shardwise.ops.gluon_support import GLUON
from shardwise.ops.triton_support import await_predecessor, interpreting, tl, triton

MAX_SPLITS = 64
DIRECT_PAIRS, DIRECT_GROUP = 32, 4
"""Most (sequence, KV head) pairs, and most query heads of one, for the kernel whose keys go straight to registers. A
step of Llama-3.1-8B (8 pairs of 4) took 5,250 µs with it and 5,372 without (H100); groups of 8 gained nothing."""
DIRECT_WARPS, DIRECT_KEYS = 4, 32
"""Of its programs."""


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
            torch.empty(
                batch * kv_heads * splits * pad * (triton.next_power_of_2(head_dim) + 2),
                dtype=torch.float32,
                device=device,
            ),
            torch.zeros(batch * splits * kv_heads, dtype=torch.int32, device=device),
            splits,
        )


def takes_head_size(size: int) -> bool:
    """A multiple of 16 from 32 to 256."""
    return 32 <= size <= 256 and not size % 16


def splits_for(batch: int, kv_heads: int, max_keys: int, processors: int) -> int:
    """Runs of keys a (sequence, head) pair is cut into: enough to fill the device, none shorter than a block of 64."""
    fill = triton.cdiv(2 * processors, batch * kv_heads)
    return max(1, min(fill, triton.cdiv(max_keys, 64), MAX_SPLITS))


def fused_decode_attention(
    qkv: torch.Tensor,  # [B, (N + 2 Nkv) D], before QK-norm and RoPE; rows may be strided
    k_cache: torch.Tensor,  # [pages, page_size, Nkv, D]
    v_cache: torch.Tensor,  # [pages, page_size, Nkv, D]
    page_table: torch.Tensor,  # int32 [B, max_pages]; with `slots` [rows, max_pages]
    positions: torch.Tensor,  # int32 [B]: keys already cached; negative marks a padding row, which yields zeros
    rope: torch.Tensor | None,  # float32 [max_position, D]: cos of each pair, then sin; None: no rotation
    workspace: DecodeWorkspace,
    *,
    heads: int,
    slots: torch.Tensor | None = None,  # int32 [B]: each sequence's row of the page table
    splits: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    rotated: int | None = None,
    q_norm: torch.Tensor | None = None,  # [D]
    k_norm: torch.Tensor | None = None,  # [D]
    eps: float = 1e-6,
    norm_last: bool = False,
    sinks: torch.Tensor | None = None,  # [N]
    window: int | None = None,
    out: torch.Tensor | None = None,  # [B, N D]
    pdl: bool = False,
) -> torch.Tensor:
    """Attention of one new token a sequence; its key and value are appended to the cache. Returns [B, N D].

    D a multiple of 16 from 32 to 256, page_size a multiple of 64 (or of itself when smaller and a power of two),
    NeoX pairing over the first `rotated` columns of a head, by default all; angles of the pairs beyond them are zero.
    `softcap` caps scores by a tanh; `norm_last`: heads are normed after their rotation. The caches may be views with
    equal strides and contiguous heads: a plain cache [slots, max_seq, Nkv, D], or one of FlashInfer's [pages, 2, Nkv,
    page_size, D] transposed. `window` counts the keys seen, the new token's included. `splits` replaces the
    workspace's, where the product with the batch fits in it.

    `pdl`: the kernel may read positions, slots, the page table, angles and what the cache holds before the kernels
    launched in front of it have ended.
    """
    page_size, kv_heads, head_dim = k_cache.shape[1:]
    batch, group, block = qkv.shape[0], heads // kv_heads, min(64, page_size)
    splits = workspace.splits if splits is None else splits
    _check(k_cache, v_cache, heads, block, batch, splits, workspace)
    rotated = 0 if rope is None else head_dim if rotated is None else rotated
    if rotated % 2 or not 0 <= rotated <= head_dim:
        raise ValueError(f"{_NAME}: {rotated} rotated columns of heads of {head_dim}, need an even number of these")
    norm = 0 if q_norm is None else 2 if norm_last else 1
    if softcap is not None and softcap <= 0:
        raise ValueError(f"{_NAME}: softcap {softcap}, need one above 0, or None")
    if (q_norm is None) != (k_norm is None):
        raise ValueError(f"{_NAME}: q_norm and k_norm come together")
    out = qkv.new_empty(batch, heads * head_dim) if out is None else out
    pdl = pdl and not interpreting()
    common = (
        qkv, k_cache, v_cache, page_table, slots, positions, rope, q_norm, k_norm, sinks, out,
        workspace.partial, workspace.counter, kv_heads, page_table.shape[1], splits, qkv.stride(0),
        *k_cache.stride()[:3], head_dim**-0.5 if scale is None else scale, softcap, eps, window or 0,
    )  # fmt: skip
    flags = dict(
        GROUP=group, PAGE=page_size, ROTATED=rotated, QK_NORM=norm, SINKS=sinks is not None,
        CAPPED=softcap is not None, WINDOW=bool(window), SLOTS=slots is not None, PDL=pdl, launch_pdl=pdl,
    )  # fmt: skip
    keys = min(DIRECT_KEYS, page_size)
    warps = min(DIRECT_WARPS, keys * head_dim // 256)
    whole = triton.next_power_of_2(head_dim)
    if GLUON and whole == head_dim and batch * kv_heads <= DIRECT_PAIRS and group <= DIRECT_GROUP and warps:
        direct_kernel[(batch * kv_heads, splits)](
            *common, G=triton.next_power_of_2(group), D=head_dim, REP=keys * head_dim // (256 * warps), WARPS=warps,
            num_warps=warps, **flags,
        )  # fmt: skip
    else:
        decode_kernel[(batch * kv_heads, splits)](
            *common, GROUP_PAD=max(16, triton.next_power_of_2(group)), HALF=whole // 2, D=head_dim, BLOCK=block,
            num_warps=4, **flags,
        )  # fmt: skip
    return out


@triton.jit
def output_gate_kernel(out_ptr, gate_ptr, columns, gate_stride, BLOCK: tl.constexpr, PDL: tl.constexpr):
    await_predecessor(PDL)
    row, i = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    out = tl.load(out_ptr + row * columns + i, mask=i < columns, other=0.0)
    gate = tl.load(gate_ptr + row * gate_stride + i, mask=i < columns, other=0.0).to(tl.float32)
    gated = out.to(tl.float32) * tl.sigmoid(gate)
    tl.store(out_ptr + row * columns + i, gated.to(out_ptr.dtype.element_ty), mask=i < columns)


def gate_output(
    attended: torch.Tensor,  # [B, C], contiguous, in place
    gates: torch.Tensor,  # [B, C], rows may be strided
    *,
    pdl: bool = False,
) -> None:
    """Each element times the sigmoid of its gate."""
    (rows, columns), block, pdl = attended.shape, 1024, pdl and not interpreting()
    output_gate_kernel[(triton.cdiv(columns, block), rows)](
        attended, gates, columns, gates.stride(0), BLOCK=block, PDL=pdl, num_warps=4, launch_pdl=pdl
    )


_NAME = fused_decode_attention.__name__


def _check(
    k_cache: torch.Tensor, v_cache: torch.Tensor, heads: int, block: int, batch: int, splits: int,
    workspace: DecodeWorkspace,
) -> None:  # fmt: skip
    page_size, kv_heads, head_dim = k_cache.shape[1:]
    if not takes_head_size(head_dim):
        raise ValueError(f"{_NAME}: head size {head_dim}, need a multiple of 16 from 32 to 256")
    if page_size % block:
        raise ValueError(f"{_NAME}: page size {page_size}, need a multiple of {block}")
    if heads % kv_heads:
        raise ValueError(f"{_NAME}: {heads} heads cannot be shared by {kv_heads} KV heads")
    if k_cache.stride() != v_cache.stride() or k_cache.stride(-1) != 1:
        raise ValueError(
            f"{_NAME}: caches with strides {k_cache.stride()} and {v_cache.stride()}, need equal ones with contiguous "
            "heads"
        )
    if not 1 <= splits <= MAX_SPLITS or batch * splits * kv_heads > workspace.counter.numel():
        raise ValueError(
            f"{_NAME}: {splits} splits (1 to {MAX_SPLITS}) of {batch} sequences with {kv_heads} KV heads exceed the "
            f"workspace's {workspace.counter.numel()} runs"
        )
