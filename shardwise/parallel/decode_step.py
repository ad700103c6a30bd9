"""The decode step on a GPU: one token of each sequence through the decoder in few kernels, fit for a CUDA graph.

Built from an assembled `Decoder`; it shares the decoder's weights and cache and computes the same function. For few
tokens a dense layer is norm + QKV product, attention (rotation, append, scores, combine), output product + residual,
norm + gate/up product + activation, down product + residual: five kernels on one rank; a layer of experts has six: the
router's product with the norm, gate/up of the chosen experts, down and their sum take the place of the last two. A
Mamba-2 mixer has five: norm + projection, convolution, state step, gated norm, output product + residual; a gated delta
mixer four, as its step gates and norms as well. Over several ranks the sums between them are the group's fused
all-reduce + residual + norm. What a product cannot take in has a kernel of its own: layer norms, norms of a block's
result, norms of all heads at once, the gate of attention's output. Larger batches use the library's matrix products and
the grouped kernels of prefill.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.ops.linear.vocab import MOST_TOKENS, POSITION, SLOT, GreedyChoice, embed
from shardwise.ops.triton_support import dependent_launch
from shardwise.parallel.decode_attention import Angles, AttentionStep, LatentStep, attention_step
from shardwise.parallel.decode_attention import reason_against as reason_against_attention
from shardwise.parallel.decode_mlp import FeedForward, feed_forward_step
from shardwise.parallel.decode_moe import reason_against as reason_against_experts
from shardwise.parallel.decode_states import SingleSpans, StateMixer, StateStep
from shardwise.parallel.decode_states import reason_against as reason_against_states
from shardwise.parallel.decode_stream import Product, Stream, added_product, joined, product, row_product
from shardwise.parallel.decoder import AnyLayer, Decoder, DecoderLayer, FeedForwardLayer, JointMixers, MixerLayer
from shardwise.parallel.device_cache import PAGE_SIZE, DeviceCache
from shardwise.parallel.layers import Linear, Norm, ResidualNorm, VocabEmbedding
from shardwise.parallel.moe import DataParallelMoe, MoeBlock, MoeWithShared

GRAPH_TRANSPORTS = ("p2p", "flashinfer", "nccl", "threads", "fake")
"""What a step can hold: transports whose collectives are kernels (threads and fake serve the tests)."""


@dataclass(frozen=True)
class JointStep:
    """Several mixers of the same input."""

    steps: tuple[AttentionStep | LatentStep | StateStep, ...]

    def partial(self, stream: Stream, positions: Tensor, slots: Tensor, *, pdl: bool) -> Tensor:
        """This rank's partial sum [B, H] of them all."""
        first, *others = self.steps
        total = added_product(first.out, first(stream, positions, slots), None, pdl=pdl)
        for step in others:
            total = added_product(step.out, step(stream, positions, slots), total, pdl=pdl)
        return total


@dataclass(frozen=True)
class Layer:
    """What the step needs of one layer, which may lack the mixer or the feed-forward.

    between  None beside both: they have the same input, and their partial sums are added
    """

    mixer: AttentionStep | LatentStep | StateStep | JointStep | None
    between: ResidualNorm | None
    feed_forward: FeedForward | None
    after: ResidualNorm

    def __call__(self, stream: Stream, positions: Tensor, slots: Tensor, *, pdl: bool) -> Stream:
        if self.mixer is None:
            assert self.feed_forward is not None
            return self.feed_forward(stream, self.after, positions)
        joining = self.after if self.feed_forward is None else self.between
        if isinstance(self.mixer, JointStep):
            assert joining is not None
            partial = self.mixer.partial(stream, positions, slots, pdl=pdl)
            stream = joined(partial, stream.residual, joining, pdl=pdl)
        else:
            mixed = self.mixer(stream, positions, slots)
            if joining is None:
                assert self.feed_forward is not None
                partial = product(self.mixer.out, Stream(mixed, mixed), pdl=pdl)
                partial = self.feed_forward.partial(stream, positions, partial)
                return joined(partial, stream.residual, self.after, pdl=pdl)
            stream = row_product(self.mixer.out, mixed, stream.residual, joining, pdl=pdl)
        return stream if self.feed_forward is None else self.feed_forward(stream, self.after, positions)


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
        reason = "" if isinstance(layer, FeedForwardLayer) else _reason_against_mixer(layer.mixer)
        if not reason and not isinstance(layer, MixerLayer):
            reason = _reason_against_feed_forward(layer.feed_forward)
        if reason:
            return f"layer {number}: {reason}"
    return ""


def _reason_against_mixer(mixer: object) -> str:
    if isinstance(mixer, JointMixers):
        return next(filter(None, map(_reason_against_mixer, mixer.mixers)), "")
    return reason_against_states(mixer) if isinstance(mixer, StateMixer) else reason_against_attention(mixer)


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
        self._table = table.weight.t().contiguous() if isinstance(table, Linear) else table
        self._angles, self._singles = Angles(cache), SingleSpans(cache.device)
        self.layers = [self._prepared(layer) for layer in decoder.layers]
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
        positions, slots = inputs[POSITION], inputs[SLOT]
        if self.cache.states:  # first: recurrent steps read slots before the kernels in front of them end
            self._singles.place(positions, slots)
        stream = self._begin(inputs)
        for layer in self.layers:
            stream = layer(stream, positions, slots, pdl=self.pdl)
        logits = product(self.head, stream, dtype=torch.float32, pdl=self.pdl)
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
        norm = self._first_norm
        if embedding.group.size > 1:
            joining = ResidualNorm(norm=norm, group=embedding.group)
            return joined(x, torch.zeros_like(x), joining, pdl=self.pdl)
        return Stream(x, x, norm) if norm is None or type(norm) is Norm else Stream(norm(x), x)

    def _choose(self, logits: Tensor) -> None:
        tokens = self.last[: logits.shape[0]]
        pairs = self._greedy.local(logits, tokens, pdl=self.pdl)
        if self._group.size > 1:
            self._greedy.winner(self._group.all_reduce(pairs), tokens)

    def _prepared(self, layer: AnyLayer) -> Layer:
        return Layer(
            mixer=None if isinstance(layer, FeedForwardLayer) else self._mixer_steps(layer.mixer),
            between=layer.between if isinstance(layer, DecoderLayer) else None,
            feed_forward=None if isinstance(layer, MixerLayer) else feed_forward_step(layer.feed_forward, pdl=self.pdl),
            after=layer.after,
        )

    def _mixer_steps(self, mixer: object) -> AttentionStep | LatentStep | StateStep | JointStep:
        if isinstance(mixer, JointMixers):
            return JointStep(tuple(self._mixer_step(each) for each in mixer.mixers))
        return self._mixer_step(mixer)

    def _mixer_step(self, mixer: object) -> AttentionStep | LatentStep | StateStep:
        if isinstance(mixer, StateMixer):
            return StateStep.of(mixer, self.cache.states, self._singles, pdl=self.pdl)
        return attention_step(mixer, self.cache, self._angles, pdl=self.pdl)
