"""Operators that stand for single nodes of an exported ONNX graph, here with the result that the node computes."""

import torch

from shardwise.ops.attention.checks import shape
from shardwise.ops.attention.reference import torch_attention
from shardwise.ops.attention.scores import causally_hidden
from shardwise.ops.dtypes import check_float
from shardwise.ops.registry import operator

FP8 = torch.float8_e4m3fn


def _fake_plugin(
    q,
    k,
    v,
    past_key_values,
    context_lengths,
    rope_rotary_cos_sin,
    kvcache_start_index,
    enable_tree_attention,
    head_size,
    num_kv_heads,
    num_q_heads,
    enable_fp8_kv_cache=0,
    sliding_window_size=-1,
):
    batch, sequence = q.shape[:2]
    present = past_key_values.new_empty(batch, 2, num_kv_heads, past_key_values.shape[3] + sequence, head_size)
    return q.new_empty(batch, sequence, num_q_heads, head_size), present


@operator(fake=_fake_plugin)
def torch_onnx_attention_plugin(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past_key_values: torch.Tensor,
    context_lengths: torch.Tensor,
    rope_rotary_cos_sin: torch.Tensor,
    kvcache_start_index: torch.Tensor,
    enable_tree_attention: int,
    head_size: int,
    num_kv_heads: int,
    num_q_heads: int,
    enable_fp8_kv_cache: int = 0,
    sliding_window_size: int = -1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and k, append k and v to the cache, attend causally: one node of a TensorRT Edge-LLM graph.

    q [B, S, Nq*Dh], k and v [B, S, Nkv*Dh]; past_key_values [B, 2, Nkv, past, Dh], float8_e4m3fn when
    enable_fp8_kv_cache is 1. kvcache_start_index [B] is the number of cached tokens of each sequence, where the new
    ones are appended; context_lengths [B] its tokens after this step, so that new tokens from context_length -
    start on are padding, with output 0. rope_rotary_cos_sin [B or 1, max_seq, Dr] holds Dr/2 cosines, then Dr/2 sines,
    for rotating the first Dr <= Dh elements by halves. sliding_window_size W > 0 keeps W positions.
    Returns (attention [B, S, Nq, Dh], present [B, 2, Nkv, past + S, Dh]); present holds past, overwritten by the new
    keys and values from each start on.

    The schema carries no tree mask, so enable_tree_attention = 1 is refused.
    """
    op = "torch_onnx_attention_plugin"
    if enable_tree_attention:
        raise ValueError(f"{op}: enable_tree_attention is {enable_tree_attention}; legal: 0, because no argument holds "
                         "the tree's mask")  # fmt: skip
    _check_plugin(op, q, k, v, past_key_values, rope_rotary_cos_sin, head_size, num_kv_heads, num_q_heads,
                  enable_fp8_kv_cache)  # fmt: skip
    batch, sequence = q.shape[:2]
    past = past_key_values.shape[3]
    starts = _lengths(op, "kvcache_start_index", kvcache_start_index, batch, past)
    _lengths(op, "context_lengths", context_lengths, batch, past + sequence)
    positions = kvcache_start_index.long().reshape(-1, 1) + torch.arange(sequence, device=q.device)
    rotating = torch.cat((q, k), dim=-1).view(batch, sequence, num_q_heads + num_kv_heads, head_size)
    turned = _rotate(rotating, _angles(op, rope_rotary_cos_sin, starts, positions))
    query, key = turned.split((num_q_heads, num_kv_heads), dim=2)
    new = torch.stack((key, v.view(batch, sequence, num_kv_heads, head_size)), dim=1).transpose(2, 3)
    present = _append(past_key_values, new, starts)
    hidden = causally_hidden(positions, torch.arange(past + sequence, device=q.device), sliding_window_size)
    hidden |= (positions >= context_lengths.reshape(-1, 1))[:, :, None]  # a padding token sees nothing
    cache = present.to(q.dtype)
    out = torch_attention(query.transpose(1, 2), cache[:, 0], cache[:, 1], attn_mask=~hidden[:, None])
    return out.transpose(1, 2).contiguous(), present


def _check_plugin(op, q, k, v, past, rope, head_size, num_kv_heads, num_q_heads, fp8) -> None:
    check_float(op, "q", q)
    for name, tensor, heads in (("q", q, num_q_heads), ("k", k, num_kv_heads), ("v", v, num_kv_heads)):
        if tensor.dim() != 3 or tensor.shape[:2] != q.shape[:2] or tensor.shape[2] != heads * head_size:
            raise ValueError(f"{op}: {name} has shape {shape(tensor)}; legal: [B, S, {heads} * {head_size}]")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{op}: {name} is {tensor.dtype}, q is {q.dtype}; legal: one dtype")
    if past.dim() != 5 or past.shape[:3] != (q.shape[0], 2, num_kv_heads) or past.shape[4] != head_size:
        raise ValueError(
            f"{op}: past_key_values has shape {shape(past)}; legal: [B, 2, {num_kv_heads}, past, {head_size}]"
        )
    if (past.dtype == FP8) != bool(fp8):
        raise TypeError(f"{op}: past_key_values is {past.dtype} and enable_fp8_kv_cache is {fp8}; legal: float8_e4m3fn "
                        "with 1, another dtype with 0")  # fmt: skip
    if rope.dim() != 3 or rope.shape[0] not in (1, q.shape[0]) or rope.shape[2] % 2 or rope.shape[2] > head_size:
        raise ValueError(f"{op}: rope_rotary_cos_sin has shape {shape(rope)}; legal: [B or 1, max_seq, Dr], Dr even "
                         f"and at most {head_size}")  # fmt: skip


def _lengths(op: str, name: str, lengths: torch.Tensor, batch: int, most: int) -> list[int]:
    """The numbers on the host, checked."""
    if lengths.numel() != batch:
        raise ValueError(f"{op}: {name} has {lengths.numel()} entries; legal: {batch}")
    numbers = lengths.flatten().tolist()
    if any(not 0 <= length <= most for length in numbers):
        raise ValueError(f"{op}: {name} is {numbers}; legal: 0 to {most}")
    return numbers


def _angles(op: str, rope: torch.Tensor, starts: list[int], positions: torch.Tensor) -> torch.Tensor:
    """Float32 rows [B, S, Dr] of rope [B or 1, max_seq, Dr] at positions [B, S], which begin at `starts`."""
    last = max(starts, default=0) + positions.shape[1] - 1
    if positions.numel() and last >= rope.shape[1]:
        raise ValueError(f"{op}: position {last} is beyond rope_rotary_cos_sin's {rope.shape[1]} positions")
    return rope.take_along_dim(positions[:, :, None], dim=1).float()


def _rotate(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate [B, S, heads, Dh] by cosines and sines [B, S, Dr], computed in float32."""
    half = angles.shape[2] // 2
    cos, sin = angles[:, :, None].tensor_split(2, dim=-1)
    first, second, rest = heads.split((half, half, heads.shape[3] - 2 * half), dim=-1)
    first, second = first.float(), second.float()
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned.to(heads.dtype), rest), dim=-1)


def _append(past: torch.Tensor, new: torch.Tensor, starts: list[int]) -> torch.Tensor:
    """past [B, 2, Nkv, past, Dh] followed by room, with new [B, 2, Nkv, S, Dh] written from `starts` on."""
    size, more = past.shape[3], new.shape[3]
    present = past.new_empty(*past.shape[:3], size + more, past.shape[4]).zero_()
    present[:, :, :, :size] = past
    for row, start in enumerate(starts):
        present[row, :, :, start : start + more] = new[row]
    return present


def _fake_gather(data, indices, batch_dims):
    depth = indices.shape[2] if indices.dim() == 3 else 1
    return data.new_empty(*indices.shape[:2], *data.shape[depth + 1 :])


@operator(fake=_fake_gather)
def torch_onnx_gather_nd(data: torch.Tensor, indices: torch.Tensor, batch_dims: int) -> torch.Tensor:
    """ONNX GatherND with one batch dimension: out[b, m] = data[b, indices[b, m]].

    data [B, S, E], indices int [B, M] or [B, M, depth], counted from the end where negative. Depth 1 (and [B, M]) picks
    rows: [B, M, E]; depth 2 picks elements: [B, M].
    """
    op = "torch_onnx_gather_nd"
    if batch_dims != 1:
        raise ValueError(f"{op}: batch_dims is {batch_dims}; legal: 1")
    if data.dim() != 3:
        raise ValueError(f"{op}: data has shape {shape(data)}; legal: [B, S, E]")
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: indices is {indices.dtype}; legal: int32, int64")
    depth = indices.shape[2] if indices.dim() == 3 else 1
    if indices.dim() not in (2, 3) or indices.shape[0] != data.shape[0] or depth not in (1, 2):
        raise ValueError(f"{op}: indices has shape {shape(indices)}; legal: [{data.shape[0]}, M] or "
                         f"[{data.shape[0]}, M, 1 or 2]")  # fmt: skip
    columns = indices.reshape(*indices.shape[:2], depth).long().unbind(-1)
    for column, size in zip(columns, data.shape[1:], strict=False):
        if column.numel() and not -size <= int(column.min()) <= int(column.max()) < size:
            raise ValueError(
                f"{op}: indices reach from {int(column.min())} to {int(column.max())}; legal: {-size} to {size - 1}"
            )
    rows = torch.arange(data.shape[0], device=data.device)[:, None]
    return data[(rows, *columns)]
