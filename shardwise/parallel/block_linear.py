"""Linear layers whose weights stay in the file's 4- and 8-bit blocks, on the CPU.

torch's CPU kernel for 4-bit weights takes `w = (code - 8) * scale + zero` with one scale and zero for 32 weights of a
row, which is the affine form of GGUF's Q4_0 and Q4_1. A Q8_0 code is `16 * high + low` with two 4-bit codes, so its
product is that of two 4-bit matrices side by side, with the input given twice. The kernel is fast for bfloat16 inputs
only (30 µs for a 960 x 576 row product on one core; float32 928 µs), so inputs and scales are rounded to bfloat16. It
takes multiples of `ROWS` outputs.
"""

import numpy as np
import torch
from torch import Tensor

from shardwise.comm.base import Communicator
from shardwise.sharding.axes import Range

GROUP = 32
ROWS = 16
NATIVE = ("Q4_0", "Q4_1", "Q8_0")
"""Storage types that have a layer here."""


def codes_of(dtype: str, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks uint8 [N, B, bytes] in the module's form: codes [N, C] in 0..15, scales [N, C / 32], zeros [N, C / 32].

    C is 32 B, or 64 B for Q8_0: the high codes of the row, then the low ones. ValueError for another dtype.
    """
    scale = blocks[..., :2].contiguous().view(torch.float16)[..., 0].float()
    if dtype == "Q4_1":
        zero = blocks[..., 2:4].contiguous().view(torch.float16)[..., 0].float()
        return _nibbles(blocks[..., 4:]), scale, zero + 8 * scale
    if dtype == "Q4_0":
        return _nibbles(blocks[..., 2:]), scale, torch.zeros_like(scale)
    if dtype != "Q8_0":
        raise ValueError(f"blocks of {dtype}, expected {', '.join(NATIVE)}")
    code = blocks[..., 2:].contiguous().view(torch.int8).to(torch.int32).flatten(1)
    low = code & 15
    return torch.cat(((code >> 4) + 8, low), 1), torch.cat((16 * scale, scale), 1), torch.cat((0 * scale, 8 * scale), 1)


def _nibbles(packed: Tensor) -> Tensor:
    """uint8 [N, B, 16], low halves first -> int32 [N, 32 B]."""
    return torch.cat((packed & 15, packed >> 4), -1).flatten(1).to(torch.int32)


class BlockLinear:
    """x [T, in] -> x W^T + b [T, out], in x's dtype. `blocks` are joined along the output, all of one dtype."""

    def __init__(self, *, dtype: str, blocks: Tensor, bias: Tensor | None = None):
        codes, scales, zeros = codes_of(dtype, blocks)
        self.out_features = codes.shape[0]
        self.planes = 2 if dtype == "Q8_0" else 1
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.scales = torch.stack((scales, zeros), -1).transpose(0, 1).contiguous().bfloat16()
        self.bias = bias

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        rounded = x.to(torch.bfloat16)
        if self.planes == 2:
            rounded = torch.cat((rounded, rounded), -1)
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(rounded, self.packed, GROUP, self.scales).to(x.dtype)
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

    def rows(self, local: Tensor) -> Tensor:
        """float32 [n, H] of rows that this rank holds."""
        return (self.scales[local].float() * self.codes[local]).flatten(1)


class BlockHead(BlockLinear):
    """The product with a Q8_0 table for logits. The kernel's results are bfloat16, in which the best ones tie; those
    within `NEAR` of a row's best are computed again in float32 (next-token agreement with float32 98.8 %, else 96.3 %).
    """

    NEAR = 2.0**-5
    """Of the best logit's magnitude; four times what rounding of inputs, scales and results adds up to."""

    def __init__(self, *, blocks: Tensor, table: BlockEmbedding):
        super().__init__(dtype="Q8_0", blocks=blocks)
        self.table = table

    def __call__(self, x: Tensor) -> Tensor:
        logits = super().__call__(x)
        if logits.shape[1] == 0:
            return logits
        for row, hidden in zip(logits, x, strict=True):
            values = row.float().numpy()
            best = float(values.max())
            near = torch.from_numpy(np.flatnonzero(values >= best - abs(best) * self.NEAR))
            row[near] = (self.table.rows(near) @ hidden.float()).to(row.dtype)
        return logits
