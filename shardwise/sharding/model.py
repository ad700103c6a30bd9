"""A whole model: layers of blocks (`spec.py`), the ends around them, and what a run leaves aside."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from shardwise.sharding.spec import Block, Embedding, Head, Moe, Norm
from shardwise.sharding.tensors import TensorSpec


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One decoder layer. Several mixers (or feed-forwards) read the same input and their outputs are summed.

    `parallel_residual`: the feed-forward reads the mixer's input. Norms that a family lacks are None. A layer without
    mixer or without feed-forward has an empty tuple there.
    """

    mixers: tuple[Block, ...] = ()
    feed_forward: tuple[Block, ...] = ()
    mixer_norm: Norm | None = None
    mixer_post_norm: Norm | None = None
    feed_forward_norm: Norm | None = None
    feed_forward_post_norm: Norm | None = None
    parallel_residual: bool = False
    residual_multiplier: float = 1.0
    others: tuple[Block, ...] = ()
    """Blocks that belong to neither: hyper-connections, layer scalars, the norms of parallel feed-forwards."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        norms = (self.mixer_norm, self.mixer_post_norm, self.feed_forward_norm, self.feed_forward_post_norm)
        return (
            tuple(n for n in norms[:2] if n)
            + self.mixers
            + tuple(n for n in norms[2:] if n)
            + self.feed_forward
            + self.others
        )

    def map_blocks(self, change: Callable[[Block], Any]) -> "Layer":
        """The layer with every block changed."""
        fields = {name: getattr(self, name) for name in ("mixers", "feed_forward", "others")}
        norms = ("mixer_norm", "mixer_post_norm", "feed_forward_norm", "feed_forward_post_norm")
        changed: dict[str, Any] = {name: tuple(change(b) for b in blocks) for name, blocks in fields.items()}
        changed |= {name: change(norm) for name in norms if (norm := getattr(self, name))}
        return replace(self, **changed)

    @cached_property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return tuple(t for b in self.blocks for t in (b.all_tensors if isinstance(b, Moe) else b.tensors))


@dataclass(frozen=True, kw_only=True)
class Extra:
    """A part of the checkpoint that a run does not load by default: vision tower, MTP layers."""

    name: str
    tensors: tuple[TensorSpec, ...] = ()
    layers: tuple[int, ...] = ()
    """Numbers that `{layer}` of its tensors stands for."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A whole text decoder."""

    name: str
    architecture: str
    hidden: int
    vocab: int
    embedding: Embedding
    layers: tuple[Layer, ...]
    """Equal layers are the same object."""
    final_norm: Norm
    head: Head
    dtype: str
    """Storage type of weights that are not quantised."""
    quantization: str = "none"
    max_positions: int = 0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    extras: tuple[Extra, ...] = ()
    others: tuple[Block, ...] = ()
    fingerprint: str = ""
    """SHA-256 of the config that this was built from."""
    notes: tuple[str, ...] = ()
    """What the reader should know: assumptions of the family, fields that were inferred."""

    @property
    def has_experts(self) -> bool:
        return any(isinstance(block, Moe) for layer, _ in self.layer_groups() for block in layer.feed_forward)

    def map_blocks(self, change: Callable[..., Any], same: Callable[[Layer], Any]) -> "ModelSpec":
        """The model with every block changed; `change` gets the block and its layer's number (or None) as `layer`.

        Layers that were equal and whose `same` is equal afterwards stay one object.
        """
        made: dict[Any, Layer] = {}
        layers = []
        for number, layer in enumerate(self.layers):
            changed = layer.map_blocks(partial(change, layer=number))
            layers.append(made.setdefault((id(layer), same(changed)), changed))
        return replace(
            self,
            embedding=change(self.embedding, layer=None),
            layers=tuple(layers),
            final_norm=change(self.final_norm, layer=None),
            head=change(self.head, layer=None),
            others=tuple(change(block, layer=None) for block in self.others),
        )

    def stored_as(self, dtype: str) -> "ModelSpec":
        """The model as if its plain weights were stored as `dtype`; quantised ones and scales stay as they are."""

        def change(tensor: TensorSpec) -> TensorSpec:
            return replace(tensor, dtype=dtype) if tensor.dtype == self.dtype else tensor

        changed = self.map_blocks(lambda block, layer: block.map_tensors(change), lambda layer: None)
        return replace(changed, dtype=dtype)

    def layer_groups(self) -> tuple[tuple[Layer, tuple[int, ...]], ...]:
        """Distinct layers with the numbers of the layers that are alike."""
        return self._layer_groups

    @cached_property
    def _layer_groups(self) -> tuple[tuple[Layer, tuple[int, ...]], ...]:
        groups: dict[int, tuple[Layer, list[int]]] = {}
        for number, layer in enumerate(self.layers):
            groups.setdefault(id(layer), (layer, []))[1].append(number)
        return tuple((layer, tuple(numbers)) for layer, numbers in groups.values())
