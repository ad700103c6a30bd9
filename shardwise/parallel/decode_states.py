"""The recurrent layers of the decode step: a projection, the cached operators, and the product that follows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.parallel.decode_stream import Product, Stream, product
from shardwise.parallel.delta import GatedDeltaMixer, side_by_side
from shardwise.parallel.layers import LinearLike
from shardwise.parallel.mamba import MambaMixer
from shardwise.parallel.states import StateCache

StateMixer = MambaMixer | GatedDeltaMixer


def reason_against(mixer: StateMixer) -> str:
    """Why a step cannot hold this mixer; empty when it can."""
    return "" if all(map(Product.takes, (*_in_projs(mixer), mixer.out))) else "weights stay quantised"


def _in_projs(mixer: StateMixer) -> tuple[LinearLike, ...]:
    return mixer.in_projs if isinstance(mixer, GatedDeltaMixer) else (mixer.in_proj,)


class SingleSpans:
    """One token of each sequence, as `StateSpans` tells of a step; `place` says which."""

    def __init__(self, device: torch.device):
        none = torch.empty(0, dtype=torch.int32, device=device)
        self.seq_len = self.cu_seqlen = self.slots = none
        self.resumes = none.bool()
        self._no_pieces = none, none, none[None]
        self._infos: dict[int, Tensor] = {}

    def place(self, positions: Tensor, slots: Tensor) -> None:
        """int32 [B] on the device; operators skip the slot -1, which padding has, whose position is -1."""
        self.slots = torch.where(positions < 0, -1, slots)

    @property
    def batch_info(self) -> Tensor:
        count = len(self.slots)
        if count not in self._infos:
            self._infos[count] = torch.tensor([0, 0, count], dtype=torch.int32)
        return self._infos[count]

    def pieces(self, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        return self._no_pieces


@dataclass(frozen=True)
class StateStep:
    """`step(stream, positions, slots)` -> what `out` takes, of the sequences where `spans` is placed. `out` is to
    follow."""

    mixer: StateMixer
    states: StateCache
    spans: SingleSpans
    in_projs: tuple[Product, ...]
    out: Product
    pdl: bool

    @classmethod
    def of(cls, mixer: StateMixer, states: StateCache, spans: SingleSpans, *, pdl: bool) -> "StateStep":
        return cls(mixer, states, spans, tuple(map(Product.of, _in_projs(mixer))), Product.of(mixer.out), pdl)

    def __call__(self, stream: Stream, positions: Tensor, slots: Tensor) -> Tensor:
        rows = side_by_side([product(in_proj, stream, pdl=self.pdl) for in_proj in self.in_projs])
        return self.mixer.mix(rows, self.spans, self.states)
