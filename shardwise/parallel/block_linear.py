"""Linear layers whose weights stay 4- and 8-bit codes, on the CPU: GGUF's blocks, and the groups of `block_groups`.

torch's CPU kernel for 4-bit weights takes `w = (code - 8) * scale + zero` with one scale and zero for 32, 64, 128 or
256 weights of a row, which is the affine form of GGUF's Q4_0 and Q4_1. An 8-bit code is `16 * high + low` with two
4-bit codes, so its product is the sum of those of two 4-bit matrices. The kernel is fast for bfloat16 inputs only
(30 µs for a 960 x 576 row product on one core; float32 928 µs), so inputs and scales are rounded to bfloat16. It takes
multiples of `ROWS` outputs. From many rows on `block_tiles` has a faster product.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from shardwise.comm.base import Communicator
from shardwise.parallel import block_tiles
from shardwise.sharding.axes import Range

ROWS = 16
NATIVE = ("Q4_0", "Q4_1", "Q8_0")
"""Storage types that have a layer here."""
LOW_MEAN = 7.5
"""Of the low halves of 8-bit codes, 0 to 15, which are about evenly spread."""
LOW_DEVIATION = (255 / 12) ** 0.5

Affine = tuple[Tensor, Tensor, Tensor]
"""A 4-bit matrix: codes int32 [N, K] in 0..15, scales [N, G] and zeros [N, G] of w = (code - 8) * scale + zero."""


def planes_of(dtype: str, blocks: Tensor) -> list[Affine]:
    """Blocks uint8 [N, B, bytes] as 4-bit matrices, whose sum they are: codes [N, C] in 0..15, scales [N, B], zeros
    [N, B] of each.

    C is 32 B. Q8_0 has two: the high codes, with what the low ones add on average, and what these add besides.
    ValueError for another dtype.
    """
    scale = _halves(blocks[..., :2])
    if dtype == "Q4_1":
        return [(_nibbles(blocks[..., 4:]), scale, _halves(blocks[..., 2:4]) + 8 * scale)]
    if dtype == "Q4_0":
        return [(_nibbles(blocks[..., 2:]), scale, torch.zeros_like(scale))]
    if dtype != "Q8_0":
        raise ValueError(f"blocks of {dtype}, expected {', '.join(NATIVE)}")
    code = blocks[..., 2:].contiguous().view(torch.int8).to(torch.int32).flatten(1)
    return halves_of(code + 128, scale, torch.zeros_like(scale))


def halves_of(codes: Tensor, scales: Tensor, zeros: Tensor) -> list[Affine]:
    """w = (code - 128) * scale + zero of codes in 0..255 as the sum of two matrices: the high halves of the codes, with
    what the low ones add on average, and what these add besides."""
    return [(codes >> 4, 16 * scales, zeros + LOW_MEAN * scales), (codes & 15, scales, (8 - LOW_MEAN) * scales)]


def _halves(pairs: Tensor) -> Tensor:
    """float16 as bytes uint8 [.., 2] -> float32 [..]."""
    return pairs.contiguous().view(torch.float16)[..., 0].float()


def _nibbles(packed: Tensor) -> Tensor:
    """uint8 [N, B, 16], low halves first -> int32 [N, 32 B]."""
    return torch.cat((packed & 15, packed >> 4), -1).flatten(1).to(torch.int32)


class Plane:
    """A matrix of 4-bit codes in the kernel's form."""

    def __init__(self, codes: Tensor, scales: Tensor, zeros: Tensor):
        self.group = codes.shape[1] // max(1, scales.shape[1])
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.scales = torch.stack((scales, zeros), -1).transpose(0, 1).contiguous().bfloat16()

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """bfloat16 [T, in] -> [T, out]."""
        return torch._weight_int4pack_mm_for_cpu(x, self.packed, self.group, self.scales)


class BlockLinear:
    """x [T, in] -> x W^T + b [T, out], in x's dtype; W is the sum of 4-bit matrices."""

    def __init__(self, *, planes: Sequence[Affine], bias: Tensor | None = None):
        self.out_features = planes[0][0].shape[0]
        self.planes = [Plane(*plane) for plane in planes]
        self.bias = bias

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for plane in self.planes)

    def __call__(self, x: Tensor) -> Tensor:
        rounded = x.to(torch.bfloat16)
        if block_tiles.takes(len(x), self.out_features):
            out = block_tiles.product(rounded, self.planes).to(x.dtype)
        else:
            first, *others = self.planes
            out = first(rounded).to(x.dtype)
            for plane in others:
                out += plane(rounded)
        return out if self.bias is None else out.add_(self.bias)


class BlockEmbedding:
    """Rows of a Q8_0 table, dequantised when looked up; as `VocabEmbedding`, ranks hold `vocab` each and sum."""

    def __init__(
        self, *, blocks: Tensor, vocab: Range, group: Communicator, dtype: torch.dtype, multiplier: float = 1.0
    ):
        self.codes = blocks[..., 2:].contiguous().view(torch.int8)  # [V, B, 32]
        self.scales = blocks[..., :2].contiguous().view(torch.float16)  # [V, B, 1]
        self.vocab, self.group, self.dtype, self.multiplier = vocab, group, dtype, multiplier

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens int64 [T] -> [T, H]."""
        start, stop = self.vocab
        foreign = (tokens < start) | (tokens >= stop)
        local = (tokens - start).masked_fill(foreign, 0)
        rows = self.rows(local).masked_fill_(foreign[:, None], 0).to(self.dtype)
        if self.group.size > 1:
            self.group.all_reduce(rows, out=rows)
        return rows * self.multiplier if self.multiplier != 1.0 else rows

    def row(self, token: int) -> Tensor | None:
        """[H] of one token, without the multiplier; None on a rank that does not hold it."""
        start, stop = self.vocab
        if not start <= token < stop:
            return None
        return (self.scales[token - start].float() * self.codes[token - start]).view(-1)

    def rows(self, local: Tensor | slice) -> Tensor:
        """float32 [n, H] of rows that this rank holds."""
        return (self.scales[local].float() * self.codes[local]).flatten(1)

    def product(self, x: Tensor) -> Tensor:
        """x [T, H] times all of this rank's rows -> bfloat16 [T, rows]: a tile of rows at a time becomes bfloat16."""
        rounded, count = x.to(torch.bfloat16), len(self.codes)
        out, step = rounded.new_empty(len(x), count), max(1, block_tiles.TILE // x.shape[1])
        for first in range(0, count, step):
            rows = slice(first, min(first + step, count))
            torch.mm(rounded, self.rows(rows).to(torch.bfloat16).t(), out=out[:, rows])
        return out


class BlockHead(BlockLinear):
    """The product with a Q8_0 table for logits. The kernel's results are bfloat16, in which the best ones tie; those
    that may be the best are computed again in float32."""

    NEAR = 2.0**-5
    """Of the best logit's magnitude; four times what rounding of inputs, scales and results adds up to."""
    DEVIATIONS = 5.0
    """Standard deviations of what low codes add, by which a logit without them may be below the best one and count as
    near. In 1,460 positions of SmolLM2 the true best was less than 3 below; within 5 are 12 of 49,152 on average."""

    def __init__(self, *, blocks: Tensor, table: BlockEmbedding):
        super().__init__(planes=planes_of("Q8_0", blocks))
        self.table = table
        self._spread = self.DEVIATIONS * LOW_DEVIATION * table.scales[..., 0].float().square().mean(1).sqrt().numpy()
        """float32 [out], for an input of length 1."""

    def __call__(self, x: Tensor) -> Tensor:
        logits = self.table.product(x).to(x.dtype) if block_tiles.pays(len(x)) else super().__call__(x)
        return self._corrected(logits, x, _largest(logits), 0.0)

    def for_best(self, x: Tensor, best_of_all: Callable[[np.ndarray], np.ndarray]) -> Tensor:
        """[T, out] of which those that may be a row's largest over all ranks are right, the others near, or those of
        their high codes.

        best_of_all  gives the largest over the ranks of each element
        """
        if block_tiles.pays(len(x)):
            logits = self.table.product(x).to(x.dtype)
            return self._corrected(logits, x, best_of_all(_largest(logits)), 0.0)
        logits = self.planes[0](x.to(torch.bfloat16)).to(x.dtype)
        return self._corrected(logits, x, best_of_all(_largest(logits)), self._spread)

    def _corrected(self, logits: Tensor, x: Tensor, best: np.ndarray, spread: np.ndarray | float) -> Tensor:
        """Logits [T, out] with those computed again in float32 that may be as large as a row's best one.

        spread  how far one may be below the best besides, for an input of length 1
        """
        for row, hidden, limit in zip(logits, x, best - abs(best) * self.NEAR, strict=True):
            chosen = row.float().numpy() + spread * float(hidden.norm()) >= limit
            rows = torch.from_numpy(chosen.nonzero()[0])
            row[rows] = (self.table.rows(rows) @ hidden.float()).to(row.dtype)
        return logits


def _largest(logits: Tensor) -> np.ndarray:
    """[T, out] -> [T]; a rank may have no outputs."""
    return logits.float().numpy().max(1, initial=-np.inf)
