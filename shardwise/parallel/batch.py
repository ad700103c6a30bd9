"""One step's batch: which tokens of which sequences enter the decoder, and where their caches continue."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from shardwise.ops.mamba.metadata import mamba_ssm_prepare_metadata
from shardwise.parallel.transfer import to_device


@dataclass(frozen=True)
class Span:
    """Consecutive new tokens of one sequence."""

    slot: int
    """The sequence's row in the cache."""
    past: int
    """Tokens that the cache already holds."""
    length: int
    wants_logits: bool = True
    """False for a chunk of a prompt that goes on in a later step."""

    @property
    def total(self) -> int:
        return self.past + self.length


class Batch:
    """Spans and their tokens, flattened: sequences with several tokens (prefill) first, then one-token ones.

    Metadata tensors follow the conventions of the cached operators (`ops/attention`), and are built when asked for.
    """

    def __init__(self, spans: Sequence[Span], tokens: Sequence[int], device: torch.device):
        self.spans = tuple(spans)
        self.device = device
        self.ids = tuple(tokens)
        self.prefills = sum(span.length != 1 for span in self.spans)
        self._rotations: dict[object, tuple[Tensor, Tensor]] = {}
        self._pieces: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        if any(span.length == 1 for span in self.spans[: self.prefills]):
            raise ValueError("one-token spans must come after longer ones")

    @property
    def size(self) -> int:
        return len(self.ids)

    @property
    def is_single_token(self) -> bool:
        return len(self.spans) == 1 and self.prefills == 0

    @property
    def tokens(self) -> Tensor:
        """int64 [T]."""
        return self._metadata.tokens

    @property
    def positions(self) -> Tensor:
        """int64 [T]."""
        return self._metadata.positions

    @property
    def logits_rows(self) -> Tensor | None:
        """int64 rows of the tokens whose logits are wanted; None: all of them."""
        rows = self._metadata.logits_rows
        return None if len(rows) == self.size else rows

    @cached_property
    def batch_info(self) -> Tensor:
        """int32 [3] on the host: prefill sequences, prefill tokens, decode sequences."""
        tokens = sum(s.length for s in self.spans[: self.prefills])
        return torch.tensor([self.prefills, tokens, len(self.spans) - self.prefills], dtype=torch.int32)

    @property
    def seq_len(self) -> Tensor:
        """int32 [spans]: new tokens of each."""
        return self._metadata.seq_len

    @property
    def input_pos(self) -> Tensor:
        """int32 [spans]: tokens that the cache holds of each."""
        return self._metadata.input_pos

    @property
    def slots(self) -> Tensor:
        """int64 [spans]."""
        return self._metadata.slots

    @property
    def cu_seqlen(self) -> Tensor:
        """int32 [spans + 1]: where each span's tokens begin."""
        return self._metadata.cu_seqlen

    @property
    def resumes(self) -> Tensor:
        """bool [prefills]: whether a prefill continues a sequence, and thus from its states."""
        return self._metadata.resumes

    def pieces(self, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where scans in chunks of so many tokens cut this step's prefill tokens (`ops/mamba/metadata.py`)."""
        if chunk not in self._pieces:
            made = mamba_ssm_prepare_metadata(
                self.positions[None], self.batch_info, self.seq_len, self.cu_seqlen, chunk
            )
            self._pieces[chunk] = made[0], made[1], made[2]
        return self._pieces[chunk]

    @cached_property
    def _metadata(self) -> "_Metadata":
        spans = self.spans
        ends = list(accumulate((span.length for span in spans), initial=0))
        wanted = [end - 1 for end, span in zip(ends[1:], spans, strict=True) if span.wants_logits]
        made = _Metadata(
            tokens=torch.tensor(self.ids, dtype=torch.int64),
            positions=torch.tensor([p for s in spans for p in range(s.past, s.total)], dtype=torch.int64),
            logits_rows=torch.tensor(wanted, dtype=torch.int64),
            seq_len=_int32(s.length for s in spans),
            input_pos=_int32(s.past for s in spans),
            slots=torch.tensor([s.slot for s in spans], dtype=torch.int64),
            cu_seqlen=_int32(ends),
            resumes=torch.tensor([s.past > 0 for s in spans[: self.prefills]], dtype=torch.bool),
        )
        return made if self.device.type == "cpu" else _Metadata(*to_device(made, self.device))

    def rotation(self, angles) -> tuple[Tensor, Tensor]:
        """(cos, sin) of this step's positions for one `RotaryAngles`, computed once a step."""
        if angles not in self._rotations:
            self._rotations[angles] = angles(self.positions)
        return self._rotations[angles]


class _Metadata(NamedTuple):
    tokens: Tensor
    positions: Tensor
    logits_rows: Tensor
    seq_len: Tensor
    input_pos: Tensor
    slots: Tensor
    cu_seqlen: Tensor
    resumes: Tensor


def _int32(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32)
