"""Layers of a tensor-parallel decoder, from plain to special. Weights are this rank's shards.

A column-parallel layer turns a whole input into this rank's part of the output; a row-parallel one turns this rank's
part of the input into a partial sum, which `ResidualNorm` adds up over the group.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.comm.base import Communicator
from shardwise.ops.normalization.triton import triton_fused_add_rms_norm_inplace
from shardwise.parallel.block_linear import BlockHead
from shardwise.parallel.memory import weight_memory
from shardwise.sharding.axes import Range


class LinearLike(Protocol):
    """x [T, in] -> [T, out]: `Linear`, or a layer whose weights stay quantised."""

    bias: Tensor | None
    out_features: int

    def __call__(self, x: Tensor) -> Tensor: ...


PANEL = 32
"""Outputs of a panel. A one-row product out of panels streams float32 weights at 22 to 28 GB/s on one thread of an AMD
EPYC (Zen 4), out of [in, out] at 12 to 18, out of [out, in] at 7 to 13 (torch 2.13): it reads them from end to end."""
JOINED_TOKENS = 256
"""From here on a product out of one matrix is faster by more than joining the panels takes: 9.5 against 11 ms for 512
tokens of [1536, 576], 38 against 47 for 2048."""


class Linear:
    """x [T, in] -> x W^T + b [T, out].

    On the CPU float32 weights lie in panels of PANEL outputs, as one batch of matrices, or in one where PANEL does not
    divide the outputs. Other weights stay as they came: 16-bit products on the CPU are faster out of [out, in], 1.7
    times in bfloat16 and 80 times in float16 (one row, 4096 x 4096, torch 2.13 on Zen 4).
    """

    def __init__(self, *, weight: Tensor, bias: Tensor | None = None):
        """weight [out, in]"""
        self.out_features = weight.shape[0]
        turned = weight.device.type == "cpu" and weight.dtype == torch.float32
        self.panels = _in_panels(weight) if turned else weight.t()[None]
        """[panels, in, outputs of one]"""
        self.bias = bias
        self._matrix = self.panels[0] if len(self.panels) == 1 else None

    @property
    def weight(self) -> Tensor:
        """[in, out]; a copy where there are several panels."""
        return self.panels.transpose(0, 1).flatten(1) if self._matrix is None else self._matrix

    def __call__(self, x: Tensor) -> Tensor:
        tokens, (panels, _, width) = x.shape[0], self.panels.shape
        if self._matrix is not None or tokens >= JOINED_TOKENS:
            matrix = self.weight
            return torch.mm(x, matrix) if self.bias is None else torch.addmm(self.bias, x, matrix)
        out = x.new_empty(tokens, self.out_features)
        torch.bmm(x.expand(panels, *x.shape), self.panels, out=out.view(tokens, panels, width).transpose(0, 1))
        return out if self.bias is None else out.add_(self.bias)

    def rows(self, outputs: Tensor) -> Tensor:
        """Weights of these outputs, int64 [n] -> [n, in], for a table that is both embedding and head."""
        if self._matrix is not None:
            return F.embedding(outputs, self._matrix.t())
        width = self.panels.shape[2]
        return self.panels[outputs // width, :, outputs % width]

    def row(self, output: int) -> Tensor:
        """Weights [in] of one output, a view."""
        panel, column = divmod(output, self.panels.shape[2])
        return self.panels[panel, :, column]


def _in_panels(weight: Tensor) -> Tensor:
    outputs, inputs = weight.shape
    width = PANEL if outputs % PANEL == 0 else outputs
    count = outputs // width if width else 1
    panels = weight_memory(count, inputs, width, dtype=weight.dtype, device=weight.device)
    for panel, rows in zip(panels, weight.split(width), strict=True):
        panel.copy_(rows.t())  # by matrices: torch turns those in blocks, 1.5 to 8 times as fast as all at once
    return panels


class Norm:
    """RMS norm over the last dimension; `offset` is added to the weight."""

    def __init__(self, *, weight: Tensor, eps: float, offset: float = 0.0):
        self.weight = weight + offset if offset else weight
        self.eps = eps
        self._zero = weight.new_zeros(())

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32 and x.dim() == 2 and x.shape[0] == 1 and not x.is_cuda:
            # One row: three kernels instead of rms_norm's six (5 µs against 9 to 17, 61 times a token).
            row = x[0]
            factor = (float(row.dot(row)) / row.shape[0] + self.eps) ** -0.5
            return torch.addcmul(self._zero, x, self.weight, value=factor)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(Norm):
    """Mean and variance over the last dimension, in float32."""

    def __init__(self, *, weight: Tensor, eps: float, offset: float = 0.0, bias: Tensor | None = None):
        super().__init__(weight=weight, eps=eps, offset=offset)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class ResidualNorm:
    """Sum of partial results over the group, residual connection, and the norm before the next block.

    `post` norms the sum before it joins the residual; `multiplier` scales it.
    """

    def __init__(self, *, norm: Norm | None, group: Communicator, post: Norm | None = None, multiplier: float = 1.0):
        self.norm, self.post, self.multiplier = norm, post, multiplier
        self.group = group
        self.is_plain = type(norm) is Norm and post is None and multiplier == 1.0

    def __call__(self, partial: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """partial, residual [T, H] -> (normed sum, sum); both arguments may be overwritten."""
        if self.norm is not None and self.is_plain and partial.is_cuda:
            if self.group.size > 1:
                return self.group.all_reduce_residual_rms_norm(partial, residual, self.norm.weight, self.norm.eps)
            triton_fused_add_rms_norm_inplace(partial, residual, self.norm.weight, self.norm.eps)
            return partial, residual
        if self.group.size > 1:
            self.group.all_reduce(partial, out=partial)
        if self.post is not None:
            partial = self.post(partial)
        if self.multiplier != 1.0:
            partial = partial * self.multiplier
        residual = residual.add_(partial)
        return residual if self.norm is None else self.norm(residual), residual


class VocabEmbedding:
    """Rows `vocab` of the embedding table; each rank looks up its own, the sum over the group has them all."""

    def __init__(self, *, table: Tensor | Linear, vocab: Range, group: Communicator, multiplier: float = 1.0):
        """table: [rows, H], or the head's product where the two are tied."""
        self.table, self.vocab, self.group, self.multiplier = table, vocab, group, multiplier

    def rows(self, local: Tensor) -> Tensor:
        """[n, H] of rows that this rank holds: int64 [n], counted from the first of them."""
        return self.table.rows(local) if isinstance(self.table, Linear) else F.embedding(local, self.table)

    def row(self, token: int) -> Tensor | None:
        """[H] of one token, without the multiplier; None on a rank that does not hold it."""
        start, stop = self.vocab
        if not start <= token < stop:
            return None
        return self.table.row(token - start) if isinstance(self.table, Linear) else self.table[token - start]

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens int64 [T] -> [T, H]."""
        if self.group.size == 1:
            rows = self.rows(tokens)
        else:
            start, stop = self.vocab
            foreign = (tokens < start) | (tokens >= stop)
            rows = self.rows((tokens - start).masked_fill_(foreign, 0))
            rows.masked_fill_(foreign[:, None], 0)
            self.group.all_reduce(rows, out=rows)
        return rows * self.multiplier if self.multiplier != 1.0 else rows


class VocabHead:
    """Logits of every token of the vocabulary, on every rank, in float32."""

    def __init__(
        self,
        *,
        linear: LinearLike,
        sizes: tuple[int, ...],
        group: Communicator,
        vocab: int,
        softcap: float | None = None,
        multiplier: float = 1.0,
    ):
        self.linear, self.sizes, self.group, self.vocab = linear, sizes, group, vocab
        self.softcap, self.multiplier = softcap, multiplier

    def __call__(self, x: Tensor) -> Tensor:
        """x [B, H] -> [B, V]."""
        return self.finish(self.linear(x))

    def best(self, x: Tensor) -> list[int]:
        """The most likely token of each row of x [B, H]: the argmax of the logits, of which only the best travel."""
        if sum(self.sizes) != self.vocab:  # a padded vocabulary has columns that are not tokens
            return self(x).argmax(-1).tolist()
        logits = self.linear.for_best(x, self._best_of_all) if isinstance(self.linear, BlockHead) else self.linear(x)
        if self.group.size == 1:
            return self.finish(logits).argmax(-1).tolist()
        first = sum(self.sizes[: self.group.rank])
        if x.is_cuda:
            values, ids = logits.max(-1)
            mine = torch.stack((values.double(), ids.double() + first), -1)[None]
            found = self.group.all_gather(mine, dim=0)  # [ranks, B, 2]
            winner = found[..., 0].argmax(0, keepdim=True)
            return found[..., 1].gather(0, winner)[0].long().tolist()
        rows = logits.float().numpy()  # NumPy finds a maximum's place in a third of torch's time
        ids = rows.argmax(1)
        everyone = self._of_all_ranks(np.stack((rows[np.arange(len(ids)), ids], first + ids), 1))
        winner = everyone[..., 0].argmax(0)
        return everyone[winner, np.arange(len(ids)), 1].astype(int).tolist()

    def _best_of_all(self, values: np.ndarray) -> np.ndarray:
        return self._of_all_ranks(values).max(0) if self.group.size > 1 else values

    def _of_all_ranks(self, values: np.ndarray) -> np.ndarray:
        """float64 [ranks, ...]: a gather as a sum, since the all-reduce has the shortest way for few bytes."""
        everyone = torch.zeros(self.group.size, *values.shape, dtype=torch.float64)
        everyone[self.group.rank] = torch.from_numpy(values)
        return self.group.all_reduce(everyone, out=everyone).numpy()

    def finish(self, logits: Tensor) -> Tensor:
        """This rank's columns of the logits -> all of them, scaled and capped."""
        if self.group.size > 1:
            logits = self.group.all_gather(logits, dim=-1, sizes=self.sizes)
        logits = logits[:, : self.vocab].float()
        if self.multiplier != 1.0:
            logits = logits * self.multiplier
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


class GatedMlp:
    """down(act(gate x) * up x); gate and up are one matrix, this rank's gate rows before its up rows."""

    def __init__(self, *, gate_up: LinearLike, down: LinearLike, activation: Callable[[Tensor], Tensor]):
        self.gate_up, self.down, self.activation = gate_up, down, activation
        self._halves = [gate_up.out_features // 2] * 2

    def __call__(self, x: Tensor) -> Tensor:
        both = self.gate_up(x)
        gate, up = both.split_with_sizes(self._halves, -1)
        return self.down(self.activation(gate).mul_(up))


class PlainMlp:
    """down(act(up x))."""

    def __init__(self, *, up: LinearLike, down: LinearLike, activation: Callable[[Tensor], Tensor]):
        self.up, self.down, self.activation = up, down, activation

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def activation_named(name: str) -> Callable[[Tensor], Tensor]:
    """The function behind a config's `hidden_act`; ValueError lists the known ones."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not supported by the runtime; supported: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": F.relu,
    "relu2": relu2,
}
