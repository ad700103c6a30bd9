"""Argument checks shared by the MLA operators, and the sizes that they derive."""

from typing import NamedTuple

import torch

from shardwise.ops.attention.checks import check_float, shape


class LatentHeads(NamedTuple):
    """Head count and sizes of one MLA call."""

    count: int  # type: ignore[assignment]  # a tuple's own method of this name is not needed
    """N"""
    nope: int
    """Dn, the part of a query and key that carries no rotation"""
    rope: int
    """Dr, the rotated part; the key's is shared by all heads"""
    value: int
    """Dv"""
    rank: int
    """R, the latent that keys and values are expanded from"""

    def scale(self, scale: float | None) -> float:
        """The default belongs to the sizes before absorption."""
        return (self.nope + self.rope) ** -0.5 if scale is None else scale


def check_latent(op: str, q_nope, q_pe, compressed_kv, kpe, weight, head_dim: int = 2) -> LatentHeads:
    """Check [B, S, N, *] queries (heads in `head_dim`), compressed_kv [B, S, R], kpe [B, S, 1, Dr] and the weight."""
    check_float(op, "q_nope", q_nope)
    for name, tensor, dims in (("q_nope", q_nope, 4), ("q_pe", q_pe, 4), ("compressed_kv", compressed_kv, 3),
                               ("kpe", kpe, 4), ("kv_b_proj_weight", weight, 2)):  # fmt: skip
        if tensor.dim() != dims:
            raise ValueError(f"{op}: {name} has shape {shape(tensor)}; legal: {dims} dimensions")
        if tensor.dtype != q_nope.dtype:
            raise TypeError(f"{op}: {name} is {tensor.dtype}, q_nope is {q_nope.dtype}; legal: one dtype")
    if q_pe.shape[:3] != q_nope.shape[:3]:
        raise ValueError(
            f"{op}: q_nope {shape(q_nope)} and q_pe {shape(q_pe)}; legal: equal but for the last dimension"
        )
    sequence = 3 - head_dim
    fits = compressed_kv.shape[0] == q_nope.shape[0] == kpe.shape[0] and compressed_kv.shape[1] == kpe.shape[sequence]
    if not fits or kpe.shape[head_dim] != 1 or kpe.shape[3] != q_pe.shape[3]:
        raise ValueError(f"{op}: compressed_kv {shape(compressed_kv)}, kpe {shape(kpe)} do not fit q_pe {shape(q_pe)}"
                         "; legal: [B, S, R], and one rotated key of q_pe's size a token")  # fmt: skip
    count, rank = q_nope.shape[head_dim], compressed_kv.shape[2]
    value, rest = divmod(weight.shape[0], count)
    if rest or value <= q_nope.shape[3] or weight.shape[1] != rank:
        raise ValueError(f"{op}: kv_b_proj_weight has shape {shape(weight)}; legal: [N * (Dn + Dv), R] with N {count}, "
                         f"Dn {q_nope.shape[3]}, R {rank}")  # fmt: skip
    return LatentHeads(count, q_nope.shape[3], q_pe.shape[3], value - q_nope.shape[3], rank)


def split_weight(weight: torch.Tensor, heads: LatentHeads) -> tuple[torch.Tensor, torch.Tensor]:
    """kv_b_proj_weight [N * (Dn + Dv), R] -> views for keys [N, Dn, R] and values [N, Dv, R]."""
    both = weight.view(heads.count, heads.nope + heads.value, heads.rank)
    return both[:, : heads.nope], both[:, heads.nope :]
