"""Where a rank's tensors come from: a checkpoint's files."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from shardwise.parallel.read_ahead import ReadAhead
from shardwise.sharding.axes import Range, span
from shardwise.sharding.checkpoint.gguf_model import StoredTensor
from shardwise.sharding.checkpoint.header import CheckpointError, TensorEntry
from shardwise.sharding.checkpoint.per_rank import is_per_rank, rank_entries
from shardwise.sharding.checkpoint.reader import Reader
from shardwise.sharding.checkpoint.resolve import Checkpoint
from shardwise.sharding.document import plan_hash
from shardwise.sharding.plan import Plan
from shardwise.sharding.shards import TensorShard

BITS = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
"""Storage types that come as bits of another type, because NumPy lacks them."""

OnBytes = Callable[[int], None]
"""Called with the number of bytes, as stored, that were read."""


class TensorSource(Protocol):
    """Gives the values of a rank's shards."""

    def fill(self, out: Tensor, shard: TensorShard, on_bytes: OnBytes) -> None:
        """Write the shard, without padding, into `out`; values are converted to its dtype."""

    def fill_stack(self, out: Tensor, shards: Sequence[TensorShard], on_bytes: OnBytes) -> None:
        """The same of shards that differ in nothing but their names, into `out` [shards, ..]."""

    def blocks(self, shard: TensorShard) -> Tensor:
        """The shard of a block-quantised matrix as it is stored: uint8 [rows, blocks, bytes of a block]."""

    def close(self) -> None: ...


class CheckpointSource:
    """Reads the byte ranges of the shards: piece by piece on the CPU, by several threads ahead of time for a GPU."""

    def __init__(
        self, checkpoint: Checkpoint, plan: Plan, rank: int, device: torch.device, *, reads_ahead: bool | None = None
    ):
        """reads_ahead: None, on a GPU."""
        self.checkpoint, self.rank = checkpoint, rank
        self._reader = Reader()
        self._own: dict[str, TensorEntry] | None = None
        """Parts in this rank's own file, where the folder was written by `shardwise shard`."""
        if checkpoint.gguf is None and is_per_rank(checkpoint.path):
            self._own = rank_entries(checkpoint.path, rank, plan.layout.world, plan_hash(plan))
        self._ahead: ReadAhead | None = None
        if device.type == "cuda" if reads_ahead is None else reads_ahead:
            self._ahead = ReadAhead(self._reader, self._locate, load_order(plan, rank), device, world=plan.layout.world)

    def fill(self, out: Tensor, shard: TensorShard, on_bytes: OnBytes) -> None:
        stored, chosen = self._locate(shard)
        bits = BITS.get(stored.entry.dtype)
        if self._ahead is not None:
            found = self._ahead.take(shard)
            out.copy_(found.view(bits) if bits else found)
            on_bytes(shard.nbytes)
            return
        per_element = shard.nbytes / max(1, out.numel())
        for (start, stop), array in self._reader.pieces(stored, chosen):
            piece = torch.from_numpy(array)
            out[start:stop].copy_(piece.view(bits) if bits else piece)
            on_bytes(int(array.size * per_element))
        self._reader.release(stored)

    def fill_stack(self, out: Tensor, shards: Sequence[TensorShard], on_bytes: OnBytes) -> None:
        for one, shard in zip(out, shards, strict=True):
            self.fill(one, shard, on_bytes)

    def blocks(self, shard: TensorShard) -> Tensor:
        return torch.from_numpy(self._reader.blocks(self._stored(shard), shard.ranges))

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
        self._reader.close()

    def _locate(self, shard: TensorShard) -> tuple[StoredTensor, tuple[tuple[Range, ...], ...]]:
        """The tensor that holds the shard, and the index ranges of the shard in it."""
        stored = self._stored(shard)
        if self._own is None:
            return stored, shard.ranges
        if shard.name not in self._own:
            raise CheckpointError(f"{self.checkpoint.path}: rank {self.rank}'s file lacks {shard.name}")
        filled = tuple(((0, span(each)),) for each in shard.ranges)  # the file has the padding behind it
        return StoredTensor(self._own[shard.name]), filled

    def _stored(self, shard: TensorShard) -> StoredTensor:
        """The checkpoint's tensor; CheckpointError when it is missing or has another shape."""
        stored = self.checkpoint.tensors.get(shard.name)
        if stored is None:
            raise CheckpointError(f"{self.checkpoint.path}: tensor {shard.name} is missing")
        if stored.entry.shape != shard.global_shape:
            raise CheckpointError(
                f"{stored.entry.path}: tensor {shard.name} has shape {list(stored.entry.shape)}, "
                f"the model needs {list(shard.global_shape)}"
            )
        return stored


def load_order(plan: Plan, rank: int) -> Iterator[TensorShard]:
    """The rank's shards in the order in which a decoder is assembled: both ends, then layer by layer."""
    model = plan.model
    for tensor in (*model.embedding.tensors, *model.head.tensors, *model.final_norm.tensors):
        yield plan.shard(rank, tensor.path())
    for number, layer in enumerate(model.layers):
        for tensor in layer.tensors:
            if not tensor.experts:
                yield plan.shard(rank, tensor.path(number))
        routed = [tensor for tensor in layer.tensors if tensor.experts]
        axes = {tensor.experts for tensor in routed}
        for expert in sorted({expert for axis in axes if axis for expert in plan.experts(rank, axis)}):
            for tensor in routed:
                yield plan.shard(rank, tensor.path(number, expert))


def filled_shape(ranges: tuple[tuple[Range, ...], ...]) -> tuple[int, ...]:
    """What the ranges select, which padding may exceed; (1,) of a scalar."""
    return tuple(map(span, ranges)) or (1,)
