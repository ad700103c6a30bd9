"""The decode step on a GPU: one token of each sequence through the decoder in few kernels, fit for a CUDA graph.

Built from an assembled `Decoder`; it shares the decoder's weights and cache and computes the same function. For few
tokens a dense layer is norm + QKV product, attention (rotation, append, scores, combine), output product + residual,
norm + gate/up product + activation, down product + residual: five kernels on one rank; a layer of experts has six: the
router's product with the norm, gate/up of the chosen experts, down and their sum take the place of the last two. Over
several ranks the sums between them are the group's fused all-reduce + residual + norm. Larger batches use the
library's matrix products and the grouped kernels of prefill.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.ops.attention.decode import fused_decode_attention, takes_head_size
from shardwise.ops.linear.decode import gated_activation, skinny_linear
from shardwise.ops.linear.vocab import MOST_TOKENS, POSITION, SLOT, GreedyChoice, embed
from shardwise.ops.triton_support import dependent_launch
from shardwise.parallel.attention import AttentionMixer
from shardwise.parallel.decode_moe import ExpertStep
from shardwise.parallel.decode_moe import reason_against as reason_against_experts
from shardwise.parallel.decode_stream import SKINNY_ROWS, Product, Stream, joined
from shardwise.parallel.decoder import Decoder, DecoderLayer, ParallelLayer
from shardwise.parallel.device_cache import PAGE_SIZE, DeviceCache
from shardwise.parallel.head_norms import HeadNorms, JointNorms
from shardwise.parallel.layers import GatedMlp, LayerNorm, Linear, ResidualNorm, VocabEmbedding
from shardwise.parallel.moe import DataParallelMoe, MoeBlock, MoeWithShared
from shardwise.parallel.rotary import RotaryAngles

GRAPH_TRANSPORTS = ("p2p", "flashinfer", "nccl", "threads", "fake")
"""What a step can hold: transports whose collectives are kernels (threads and fake serve the tests)."""


@dataclass(frozen=True)
class Layer:
    """What the step needs of one layer."""

    mixer: AttentionMixer
    norms: HeadNorms | None
    qkv: Product
    out: Product
    rope: Tensor | None
    between: ResidualNorm
    feed_forward: Callable[[Stream, ResidualNorm, Tensor], Stream]
    after: ResidualNorm


def reason_against(decoder: Decoder) -> str:
    """Why this decoder cannot take the fused step; empty when it can."""
    if not isinstance(decoder.embedding, VocabEmbedding) or not isinstance(decoder.head.linear, Linear):
        return "embedding or head stay quantised"
    if decoder.head.vocab > MOST_TOKENS:
        return f"a vocabulary of {decoder.head.vocab}, at most {MOST_TOKENS}"
    group = decoder.head.group
    if group.size > 1 and group.transport not in GRAPH_TRANSPORTS:
        return f"transport {group.transport} passes through the host, which a graph cannot hold"
    for number, layer in enumerate(decoder.layers):
        if isinstance(layer, ParallelLayer) or any(isinstance(x.norm, LayerNorm) for x in (layer.between, layer.after)):
            return f"layer {number}: layer norms, or blocks in parallel"
        reason = _reason_against_mixer(layer.mixer) or _reason_against_feed_forward(layer.feed_forward)
        if reason:
            return f"layer {number}: {reason}"
    return ""


def _reason_against_mixer(mixer: object) -> str:
    if not isinstance(mixer, AttentionMixer):
        return "no attention of plain queries, keys and values"
    size = mixer.head_dim
    if mixer.v_head_dim != size or not takes_head_size(size):
        return f"head sizes {size} and {mixer.v_head_dim}, need one power of two from 32 to 256"
    if mixer.masking.softcap is not None:
        return "capped scores"
    if isinstance(mixer.qk_norms, JointNorms):
        return "all heads are normed at once"
    if mixer.norm_after_rotation:
        return "heads are normed behind their rotation"
    if mixer.rotary is not None and 2 * mixer.rotary.frequencies.numel() != size:
        return "rotation of part of the head"
    return "" if isinstance(mixer.qkv, Linear) and isinstance(mixer.out, Linear) else "weights stay quantised"


def _reason_against_feed_forward(inner: object) -> str:
    if isinstance(inner, DataParallelMoe):
        return "groups with tokens of their own tell each other how many through the host"
    if isinstance(inner, MoeWithShared):
        inner = inner.routed
    return reason_against_experts(inner) if isinstance(inner, MoeBlock) else ""


class DecodeStep:
    """`step(inputs)` -> this rank's columns of the logits, and each row's greedy token in `last`.

    last    int32 [max_batch]: tokens of the last step, from which the next one may begin
    layers  what it needs of each layer
    head    the product that gives the logits
    """

    def __init__(self, decoder: Decoder, cache: DeviceCache, *, max_batch: int):
        """ValueError when `reason_against(decoder)` names one."""
        reason = reason_against(decoder)
        if reason:
            raise ValueError(f"no fused decode step: {reason}")
        assert isinstance(decoder.embedding, VocabEmbedding)
        self.cache, self.pdl = cache, dependent_launch(cache.device)
        self.last = torch.zeros(max_batch, dtype=torch.int32, device=cache.device)
        self._embedding, self._first_norm = decoder.embedding, decoder.first_norm
        table = decoder.embedding.table
        self._table = Product.of(table).weight if isinstance(table, Linear) else table
        self._rope: dict[RotaryAngles, Tensor] = {}
        self.layers = [self._prepared(layer) for layer in decoder.layers if isinstance(layer, DecoderLayer)]
        head = decoder.head
        self.head, self._group = Product.of(head.linear), head.group
        first = sum(head.sizes[: head.group.rank])
        self._greedy = GreedyChoice(
            most=max_batch,
            columns=head.linear.out_features,
            first=first,
            limit=max(0, min(head.vocab - first, head.linear.out_features)),
            rank=head.group.rank,
            ranks=head.group.size,
            device=cache.device,
        )

    def __call__(self, inputs: Tensor) -> Tensor:
        """inputs int32 [4 + page tables, B] (`ops/linear/vocab.py`) -> [B, columns of this rank], in float32 or the
        weights' type."""
        stream = self._begin(inputs)
        positions, slots = inputs[POSITION], inputs[SLOT]
        for number, layer in enumerate(self.layers):
            stream = self._layer(layer, number, stream, positions, slots)
        logits = self._product(self.head, stream, dtype=torch.float32)
        self._choose(logits)
        return logits

    def _begin(self, inputs: Tensor) -> Stream:
        embedding = self._embedding
        x = embed(
            inputs,
            self.last,
            self.cache.page_tables,
            self._table,
            first=embedding.vocab[0],
            page_size=PAGE_SIZE,
            multiplier=embedding.multiplier,
        )
        if embedding.group.size > 1:
            join = ResidualNorm(norm=self._first_norm, group=embedding.group)
            return Stream(*join(x, torch.zeros_like(x)))
        return Stream(x, x, self._first_norm)

    def _choose(self, logits: Tensor) -> None:
        tokens = self.last[: logits.shape[0]]
        pairs = self._greedy.local(logits, tokens, pdl=self.pdl)
        if self._group.size > 1:
            self._greedy.winner(self._group.all_reduce(pairs), tokens)

    def _layer(self, layer: Layer, number: int, stream: Stream, positions: Tensor, slots: Tensor) -> Stream:
        mixer, norms, cache = layer.mixer, layer.norms, self.cache
        qkv = self._product(layer.qkv, stream)
        attended = fused_decode_attention(
            qkv,
            *cache.pages(number),
            cache.table(number),
            positions,
            layer.rope,
            cache.workspace(mixer.heads, mixer.kv_heads, mixer.head_dim),
            heads=mixer.heads,
            slots=slots,
            splits=cache.splits(mixer.kv_heads, mixer.masking.window, qkv.shape[0]),
            scale=mixer.masking.scale,
            q_norm=norms.q.weight if norms else None,
            k_norm=norms.k.weight if norms else None,
            eps=norms.q.eps if norms else 0.0,
            sinks=mixer.masking.sinks,
            window=mixer.masking.window,
            pdl=self.pdl,
        )
        stream = self._row_product(layer.out, attended, stream.residual, layer.between)
        return layer.feed_forward(stream, layer.after, positions)

    def _product(self, product: Product, stream: Stream, dtype: torch.dtype | None = None) -> Tensor:
        """`dtype`: of the result where that costs nothing."""
        if not stream.is_skinny:
            return F.linear(stream.normed(), product.weight, product.bias)
        norm = stream.norm
        return skinny_linear(
            stream.x,
            product.weight,
            norm_weight=norm.weight if norm else None,
            eps=norm.eps if norm else 0.0,
            bias=product.bias,
            out_dtype=dtype,
            pdl=self.pdl,
        )

    def _row_product(self, product: Product, x: Tensor, residual: Tensor, join: ResidualNorm) -> Stream:
        """The row-parallel product, its sum over the group, the residual, and the norm now or with the next product."""
        if x.shape[0] > SKINNY_ROWS:
            return joined(F.linear(x, product.weight, product.bias), residual, join)
        if join.group.size == 1 and join.is_plain:
            summed = skinny_linear(x, product.weight, bias=product.bias, residual=residual, pdl=self.pdl)
            return Stream(summed, summed, join.norm)
        return joined(skinny_linear(x, product.weight, bias=product.bias, pdl=self.pdl), residual, join)

    def _prepared(self, layer: DecoderLayer) -> Layer:
        mixer = layer.mixer
        assert isinstance(mixer, AttentionMixer)  # else `reason_against` had one
        assert not isinstance(mixer.qk_norms, JointNorms)
        return Layer(
            mixer,
            mixer.qk_norms,
            Product.of(mixer.qkv),
            Product.of(mixer.out),
            self._angles(mixer.rotary),
            layer.between,
            self._feed_forward(layer.feed_forward),
            layer.after,
        )

    def _feed_forward(self, inner: Callable[[Tensor], Tensor]) -> Callable[[Stream, ResidualNorm, Tensor], Stream]:
        if isinstance(inner, MoeBlock):
            return ExpertStep(inner, pdl=self.pdl)
        if isinstance(inner, MoeWithShared):
            routed = ExpertStep(inner.routed, pdl=self.pdl)
            return lambda stream, join, positions: joined(
                routed.partial(stream, positions) + inner.shared(stream.normed()), stream.residual, join
            )
        if isinstance(inner, GatedMlp) and inner.activation is F.silu and inner.gate_up.bias is None:
            gate_up, down = Product.of(inner.gate_up), Product.of(inner.down)
            return lambda stream, join, positions: self._row_product(
                down, self._gated(gate_up, stream), stream.residual, join
            )
        return lambda stream, join, positions: joined(inner(stream.normed()), stream.residual, join)

    def _gated(self, gate_up: Product, stream: Stream) -> Tensor:
        if not stream.is_skinny:
            return gated_activation(F.linear(stream.normed(), gate_up.weight), pdl=self.pdl)
        norm = stream.norm
        return skinny_linear(
            stream.x,
            gate_up.weight,
            norm_weight=norm.weight if norm else None,
            eps=norm.eps if norm else 0.0,
            gated=True,
            pdl=self.pdl,
        )

    def _angles(self, rotary: RotaryAngles | None) -> Tensor | None:
        """float32 [length, D]: cos of the first half, then sin, of every position that the cache may hold."""
        if rotary is None:
            return None
        if rotary not in self._rope:
            device = self.cache.device
            places = torch.arange(self.cache.max_length, device=device, dtype=torch.float32)
            angles = places[:, None] * rotary.frequencies.to(device)
            self._rope[rotary] = torch.cat((angles.cos(), angles.sin()), -1) * rotary.scale
        return self._rope[rotary]
