"""Bytes that a rank needs besides weights: KV cache a token, recurrent state a sequence."""

from collections.abc import Callable
from dataclasses import dataclass

from shardwise.sharding.axes import LogicalAxis, Share
from shardwise.sharding.model import ModelSpec
from shardwise.sharding.spec import Attention, Block, CompressedAttention, GatedDelta, Mamba2, MlaAttention

STATE_ITEMSIZE = 4
ShareOf = Callable[[LogicalAxis], Share]


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """What one kind of layer keeps: bytes a token (up to `window` tokens), bytes a sequence, and in how many layers."""

    layers: int
    token_bytes: int = 0
    window: int | None = None
    sequence_bytes: int = 0
    tokens_per_entry: int = 1
    """A compressed cache keeps one entry for so many tokens."""

    def bytes_at(self, context: int) -> int:
        """Bytes of one sequence of `context` tokens."""
        kept = context if self.window is None else min(context, self.window)
        return self.layers * (-(-kept // self.tokens_per_entry) * self.token_bytes + self.sequence_bytes)


def cache_entries(
    model: ModelSpec, share_of: ShareOf, kv_itemsize: int, *, spare_inputs: int = 0
) -> tuple[CacheEntry, ...]:
    """Cache of every kind of layer on the rank whose shares `share_of` gives.

    `kv_itemsize`: bytes of an element of keys, values and convolution states; recurrent states are float32.
    `spare_inputs`: that a convolution of K inputs keeps beside the K - 1 which the next token needs.
    """
    return tuple(
        entry
        for layer, numbers in model.layer_groups()
        for mixer in layer.mixers
        for entry in _entries(mixer, len(numbers), share_of, kv_itemsize, spare_inputs)
    )


def _entries(mixer: Block, layers: int, share_of: ShareOf, kv: int, spare: int) -> tuple[CacheEntry, ...]:
    match mixer:
        case Attention():
            width = share_of(mixer.kv_axis).length * (mixer.head_dim + mixer.v_head_dim)
            return (CacheEntry(layers, (width + mixer.index_head_dim) * kv, mixer.window or mixer.chunk),)
        case MlaAttention():
            # The indexer keeps one FP8 key a token with its float32 scale.
            index = mixer.index_head_dim + 4 if mixer.index_heads else 0
            return (CacheEntry(layers, (mixer.kv_rank + mixer.rope_dim) * kv + index),)
        case CompressedAttention():
            window = CacheEntry(layers, mixer.head_dim * kv, mixer.window)
            if not mixer.compress_ratio:
                return (window,)
            index = mixer.index_head_dim + 4 if mixer.index_heads else 0
            return window, CacheEntry(layers, mixer.head_dim * kv + index, tokens_per_entry=mixer.compress_ratio)
        case Mamba2():
            heads, groups = share_of(mixer.head_axis).length, share_of(mixer.group_axis).length
            inputs = (heads * mixer.head_dim + 2 * groups * mixer.state) * (mixer.conv_kernel - 1 + spare)
            size = heads * mixer.head_dim * mixer.state * STATE_ITEMSIZE + inputs * kv
            return (CacheEntry(layers, sequence_bytes=size),)
        case GatedDelta():
            k, v = share_of(mixer.k_axis).length, share_of(mixer.v_axis).length
            inputs = (2 * k * mixer.k_head_dim + v * mixer.v_head_dim) * (mixer.conv_kernel - 1 + spare)
            size = v * mixer.v_head_dim * mixer.k_head_dim * STATE_ITEMSIZE + inputs * kv
            return (CacheEntry(layers, sequence_bytes=size),)
    return ()
