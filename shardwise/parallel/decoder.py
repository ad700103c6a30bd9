"""The decoder: a stack of layers between embedding and head, run on one batch at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from shardwise.parallel.batch import Batch
from shardwise.parallel.cache import KvCache
from shardwise.parallel.layers import Norm, ResidualNorm, VocabHead


@dataclass
class DecoderLayer:
    """One layer between two norms: it takes a normed input and leaves the last partial sum to the next norm."""

    mixer: Callable[[Tensor, Batch, KvCache], Tensor]
    between: ResidualNorm
    feed_forward: Callable[[Tensor], Tensor]
    after: ResidualNorm
    """Adds the feed-forward's result and norms it for the next layer."""

    def __call__(self, x: Tensor, residual: Tensor, batch: Batch, cache: KvCache) -> tuple[Tensor, Tensor]:
        x, residual = self.between(self.mixer(x, batch, cache), residual)
        return self.after(self.feed_forward(x), residual)


@dataclass
class ParallelLayer:
    """Mixer and feed-forward of the same normed input, in one sum."""

    mixer: Callable[[Tensor, Batch, KvCache], Tensor]
    feed_forward: Callable[[Tensor], Tensor]
    after: ResidualNorm

    def __call__(self, x: Tensor, residual: Tensor, batch: Batch, cache: KvCache) -> tuple[Tensor, Tensor]:
        return self.after(self.mixer(x, batch, cache) + self.feed_forward(x), residual)


@dataclass
class JointMixers:
    """Several mixers of the same normed input, in one sum."""

    mixers: Sequence[Callable[[Tensor, Batch, KvCache], Tensor]]

    def __call__(self, x: Tensor, batch: Batch, cache: KvCache) -> Tensor:
        first, *others = (mixer(x, batch, cache) for mixer in self.mixers)
        for partial in others:
            first += partial
        return first


@dataclass
class MixerLayer:
    """A mixer alone."""

    mixer: Callable[[Tensor, Batch, KvCache], Tensor]
    after: ResidualNorm

    def __call__(self, x: Tensor, residual: Tensor, batch: Batch, cache: KvCache) -> tuple[Tensor, Tensor]:
        return self.after(self.mixer(x, batch, cache), residual)


@dataclass
class FeedForwardLayer:
    """A feed-forward alone."""

    feed_forward: Callable[[Tensor], Tensor]
    after: ResidualNorm

    def __call__(self, x: Tensor, residual: Tensor, batch: Batch, cache: KvCache) -> tuple[Tensor, Tensor]:
        return self.after(self.feed_forward(x), residual)


AnyLayer = DecoderLayer | ParallelLayer | MixerLayer | FeedForwardLayer


class Decoder:
    """Embedding, layers, head of one rank."""

    def __init__(
        self,
        *,
        embedding: Callable[[Tensor], Tensor],
        first_norm: Norm | None,
        layers: Sequence[AnyLayer],
        head: VocabHead,
    ):
        self.embedding, self.first_norm, self.layers, self.head = embedding, first_norm, layers, head

    def __call__(self, batch: Batch, cache: KvCache) -> Tensor:
        """Logits float32 [number of spans that want them, V], identical on every rank."""
        return self.head(self.hidden(batch, cache))

    def hidden(self, batch: Batch, cache: KvCache) -> Tensor:
        """The head's input [number of spans that want logits, H]."""
        residual = self.embedding(batch.tokens)
        x = residual if self.first_norm is None else self.first_norm(residual)
        for layer in self.layers:
            x, residual = layer(x, residual, batch, cache)
        rows = batch.logits_rows
        return x if rows is None else x[rows]
