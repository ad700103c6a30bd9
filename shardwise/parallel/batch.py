"""One step's work: which tokens of which sequences enter the decoder, and where their caches continue."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


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
        if any(span.length == 1 for span in self.spans[: self.prefills]):
            raise ValueError("one-token spans must stand behind longer ones")

    @property
    def size(self) -> int:
        return len(self.ids)

    @property
    def is_single_token(self) -> bool:
        return len(self.spans) == 1 and self.prefills == 0

    @cached_property
    def tokens(self) -> Tensor:
        """int64 [T]."""
        return torch.tensor(self.ids, dtype=torch.int64, device=self.device)

    @cached_property
    def positions(self) -> Tensor:
        """int64 [T]."""
        return torch.tensor([p for s in self.spans for p in range(s.past, s.total)], device=self.device)

    @cached_property
    def logits_rows(self) -> Tensor | None:
        """int64 rows of the tokens whose logits are wanted; None: all of them."""
        rows, end = [], 0
        for span in self.spans:
            end += span.length
            if span.wants_logits:
                rows.append(end - 1)
        return None if len(rows) == self.size else torch.tensor(rows, dtype=torch.int64, device=self.device)

    @cached_property
    def batch_info(self) -> Tensor:
        """int32 [3] on the host: prefill sequences, prefill tokens, decode sequences."""
        tokens = sum(s.length for s in self.spans[: self.prefills])
        return torch.tensor([self.prefills, tokens, len(self.spans) - self.prefills], dtype=torch.int32)

    @cached_property
    def seq_len(self) -> Tensor:
        return self._int32([s.length for s in self.spans])

    @cached_property
    def input_pos(self) -> Tensor:
        return self._int32([s.past for s in self.spans])

    @cached_property
    def slots(self) -> Tensor:
        return torch.tensor([s.slot for s in self.spans], dtype=torch.int64, device=self.device)

    @cached_property
    def cu_seqlen(self) -> Tensor:
        ends = [0]
        for span in self.spans:
            ends.append(ends[-1] + span.length)
        return self._int32(ends)

    def rotation(self, angles) -> tuple[Tensor, Tensor]:
        """(cos, sin) of this step's positions for one `RotaryAngles`, computed once a step."""
        if angles not in self._rotations:
            self._rotations[angles] = angles(self.positions)
        return self._rotations[angles]

    def _int32(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)
