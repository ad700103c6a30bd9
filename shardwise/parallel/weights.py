"""This rank's weights: read from a checkpoint by the plan's ranges, each tensor exactly once."""

from collections.abc import Callable
from math import prod

import numpy as np
import torch
from torch import Tensor

from shardwise.sharding.checkpoint.header import CheckpointError
from shardwise.sharding.checkpoint.reader import NUMPY, Reader
from shardwise.sharding.checkpoint.resolve import Checkpoint
from shardwise.sharding.plan import Plan
from shardwise.sharding.shards import TensorShard
from shardwise.sharding.spec import Block, TensorSpec

Progress = Callable[[int, int], None]
"""Called with (bytes read so far, bytes to read), both as stored."""

_BITS = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
_FLOATS = {"F64", "F32", "F16", "BF16"}


class Weights:
    """Gives out a rank's shards. Floating point types and dequantised ones become `dtype`, integers stay as stored."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        rank: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        on_progress: Progress | None = None,
    ):
        self.plan, self.rank, self.dtype, self.device = plan, rank, dtype, device
        self._checkpoint, self._reader = checkpoint, Reader()
        self._progress = on_progress or (lambda done, total: None)
        self._taken: set[str] = set()
        self._read_bytes = 0
        self._total_bytes = sum(shard.nbytes for shard in plan.shards(rank))
        self.held_bytes = 0
        """Bytes of the tensors given out so far."""

    def shard(self, spec: TensorSpec, layer: int | None = None, expert: int | None = None) -> TensorShard:
        return self.plan.shard(self.rank, spec.path(layer, expert))

    def take(self, block: Block, *roles: str, layer: int | None = None, expert: int | None = None) -> Tensor | None:
        """The rank's shards of these roles' tensors, joined along the first dimension; None when the block has none.

        CheckpointError for a tensor that the checkpoint lacks or holds in another shape.
        """
        specs = [block.roles[role] for role in roles if role in block.roles]
        if not specs:
            return None
        shards = [self.shard(spec, layer, expert) for spec in specs]
        first = shards[0]
        rows = sum(shard.local_shape[0] for shard in shards)
        out = torch.empty(rows, *first.local_shape[1:], dtype=self._runtime_dtype(first), device=self.device)
        start = 0
        for shard in shards:
            self._fill(out[start : start + shard.local_shape[0]], shard)
            start += shard.local_shape[0]
        self.held_bytes += out.numel() * out.element_size()
        return out

    def finish(self) -> None:
        """CheckpointError unless every tensor of the plan that this rank holds was given out once."""
        left = [shard.name for shard in self.plan.shards(self.rank) if shard.name not in self._taken]
        if left:
            raise CheckpointError(f"{len(left)} tensors of the model are used by no layer of the runtime: {left[:5]}")
        self._reader.close()

    def _runtime_dtype(self, shard: TensorShard) -> torch.dtype:
        if shard.dtype in _FLOATS or shard.dtype not in NUMPY:
            return self.dtype
        return _BITS.get(shard.dtype) or torch.from_numpy(np.empty(0, NUMPY[shard.dtype])).dtype

    def _fill(self, out: Tensor, shard: TensorShard) -> None:
        if shard.name in self._taken:
            raise AssertionError(f"tensor {shard.name} is taken twice")
        self._taken.add(shard.name)
        stored = self._checkpoint.tensors.get(shard.name)
        if stored is None:
            raise CheckpointError(f"{self._checkpoint.path}: tensor {shard.name} is missing")
        if stored.entry.shape != shard.global_shape:
            raise CheckpointError(
                f"{stored.entry.path}: tensor {shard.name} has shape {list(stored.entry.shape)}, "
                f"the model needs {list(shard.global_shape)}"
            )
        filled = tuple(sum(b - a for a, b in ranges) for ranges in shard.ranges)
        if filled != tuple(out.shape):
            out.zero_()  # a padded axis
        inside = out[tuple(slice(0, n) for n in filled)]
        per_element = shard.nbytes / max(1, prod(filled))
        for (start, stop), array in self._reader.pieces(stored, shard.ranges):
            piece = torch.from_numpy(array)
            if stored.entry.dtype in _BITS:
                piece = piece.view(_BITS[stored.entry.dtype])
            inside[start:stop].copy_(piece)
            self._read_bytes += int(array.size * per_element)
            self._progress(min(self._read_bytes, self._total_bytes), self._total_bytes)
