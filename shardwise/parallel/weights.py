"""This rank's weights: the plan's ranges of a checkpoint, or random values in their place, each tensor exactly once."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from shardwise.parallel.block_linear import NATIVE, ROWS
from shardwise.parallel.dequantise import Part, Ranges, dequantise
from shardwise.parallel.dummy import RandomSource
from shardwise.parallel.sources import BITS, CheckpointSource, TensorSource, filled_shape
from shardwise.parallel.storage import FLOATS
from shardwise.sharding.axes import LogicalAxis, span
from shardwise.sharding.checkpoint.header import STORAGE, CheckpointError
from shardwise.sharding.checkpoint.reader import NUMPY
from shardwise.sharding.checkpoint.resolve import Checkpoint
from shardwise.sharding.plan import Plan
from shardwise.sharding.shards import TensorShard
from shardwise.sharding.spec import Block
from shardwise.sharding.tensors import TensorSpec

Progress = Callable[[int, int], None]
"""Called with (bytes read so far, bytes to read), both as stored."""

_PARTS = ("weight", "scale", "zeros", "group_index", "global_scale", "global_divisor")
"""Of a quantised weight, by what follows its role."""
_UNUSED = ("input_scale", "shape")
"""Of the same, but inputs are not quantised here, and the shape is known."""


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
        native: bool = False,
        packs_mxfp4: bool = False,
        keeps_float8: bool = False,
        keeps_int4: bool = False,
        on_progress: Progress | None = None,
    ):
        self.plan, self.rank, self.dtype, self.device = plan, rank, dtype, device
        self.native = native
        self.packs_mxfp4 = packs_mxfp4
        """Whether experts that are stored as MXFP4 stay so, for kernels that multiply with them."""
        self.keeps_float8 = keeps_float8
        """The same of float8 weights, which `load_float8` loads."""
        self.keeps_int4 = keeps_int4
        """The same of 4-bit integers in groups, which `load_int4` loads."""
        self._source: TensorSource
        if checkpoint.random_seed is not None:
            self._source = RandomSource(checkpoint.random_seed)
        else:
            self._source = CheckpointSource(checkpoint, plan, rank, device)
        self._progress = on_progress or (lambda done, total: None)
        self._taken: set[str] = set()
        self._read_bytes = 0
        self._quantised_bytes = self._dequantised_bytes = 0
        """Of what was dequantised: as it is stored, and as it is held."""
        self._total_bytes = sum(shard.nbytes for shard in plan.shards(rank))

    def shard(self, spec: TensorSpec, layer: int | None = None, expert: int | None = None) -> TensorShard:
        return self.plan.shard(self.rank, spec.path(layer, expert))

    def units(self, axis: LogicalAxis) -> int:
        """Units of an axis that this rank holds, padding included."""
        return self.plan.cuts.share(axis, self.plan.layout.coordinates(self.rank)).length

    def find(
        self,
        block: Block,
        *roles: str,
        layer: int | None = None,
        expert: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor | None:
        """`take`, or None when the block has none of these roles."""
        present = [role for role in roles if role in block.roles]
        return self.take(block, *present, layer=layer, expert=expert, dtype=dtype) if present else None

    def take(
        self,
        block: Block,
        *roles: str,
        layer: int | None = None,
        expert: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The rank's shards of these roles' tensors, joined along the first dimension.

        `dtype` replaces the runtime's. CheckpointError for a tensor that is missing or has another shape.
        """
        specs = [block.roles[role] for role in roles]
        shards = [self.shard(spec, layer, expert) for spec in specs]
        rows = sum(shard.local_shape[0] if shard.local_shape else 1 for shard in shards)
        dtype = dtype or self._runtime_dtype(shards[0])
        out = torch.empty(rows, *shards[0].local_shape[1:], dtype=dtype, device=self.device)
        start = 0
        for spec, shard in zip(specs, shards, strict=True):
            stop = start + (shard.local_shape[0] if shard.local_shape else 1)
            self._fill(out[start:stop], shard)
            self._pad_segments(out[start:stop], spec)
            if shard.dtype not in NUMPY:
                self._quantised_bytes += shard.nbytes
                self._dequantised_bytes += out[start:stop].nbytes
            start = stop
        return out

    def linear(self, block: Block, *roles: str, layer: int | None = None, expert: int | None = None) -> Tensor:
        """Weights of linear layers in the runtime's dtype, joined along the outputs.

        [.., out, in] where one is stored with scales, and so dequantised; else as stored.
        """
        if not any(is_quantised(block, role) for role in roles):
            return self.take(block, *(f"{role}.weight" for role in roles), layer=layer, expert=expert)
        shapes = [self.linear_shape(block, role) for role in roles]
        lead, outputs = shapes[0][:-2], [shape[-2] for shape in shapes]
        out = torch.empty(*lead, sum(outputs), shapes[0][-1], dtype=self.dtype, device=self.device)
        for role, part in zip(roles, out.split_with_sizes(outputs, -2), strict=True):
            if is_quantised(block, role):
                self._dequantise(part, block, role, layer, expert)
            else:
                self._fill(part, self.shard(block.roles[f"{role}.weight"], layer, expert))
        return out

    def linear_shape(self, block: Block, role: str, rank: int | None = None) -> tuple[int, ...]:
        """[.., out, in] of this rank's part of a weight, or of another's, in values whatever their storage."""
        spec = block.roles[f"{role}.weight"]
        at = self.plan.layout.coordinates(self.rank if rank is None else rank)
        *lead, first, second = (length for _, length in self.plan.cuts.values(spec, at))
        return (*lead, second, first) if spec.transposed else (*lead, first, second)

    def blocks(self, block: Block, *roles: str, layer: int | None = None) -> tuple[str, Tensor] | None:
        """(storage type, uint8 [rows, blocks, bytes]) of these roles' weights as stored, joined along the rows.

        None unless weights stay in their form and all of these have the same one of NATIVE, cut at whole blocks, with a
        multiple of ROWS rows.
        """
        shards = [self.shard(block.roles[f"{role}.weight"], layer) for role in roles]
        types = {shard.dtype for shard in shards}
        if not self.native or len(types) > 1 or not types <= set(NATIVE) or not all(map(_whole_blocks, shards)):
            return None
        if sum(shard.local_shape[0] for shard in shards) % ROWS:
            return None
        parts = []
        for shard in shards:
            self._take(shard)
            parts.append(self._source.blocks(shard))
            self._on_bytes(shard.nbytes)
        return types.pop(), torch.cat(parts)

    def describe_dequantised(self) -> str:
        """What dequantised weights take, and what they take as they are stored; empty where none were."""
        if not self._dequantised_bytes:
            return ""
        held, stored = self._dequantised_bytes / 2**20, self._quantised_bytes / 2**20
        return f"{held:.1f} MiB of them dequantised from {stored:.1f} MiB"

    def require_all_taken(self) -> None:
        """CheckpointError unless every tensor of the plan that this rank holds was given out once."""
        left = [shard.name for shard in self.plan.shards(self.rank) if shard.name not in self._taken]
        if left:
            raise CheckpointError(f"{len(left)} tensors of the model are used by no layer of the runtime: {left[:5]}")

    def close(self) -> None:
        """Also when the model was not built to its end: files are closed, and nothing is read any more."""
        self._source.close()

    def parts(self, block: Block, role: str, layer: int | None = None, expert: int | None = None) -> dict[str, Part]:
        """What this rank holds of a quantised weight and of what belongs to it, by what follows the role."""
        stacks = self.stacked_parts(block, role, layer, [expert])
        return {name: replace(stack, values=stack.values[0]) for name, stack in stacks.items()}

    def stacked_parts(
        self, block: Block, role: str, layer: int | None, experts: Sequence[int | None]
    ) -> dict[str, Part]:
        """The same of several experts: values [experts, ..]."""
        present = [part for part in (*_PARTS, *_UNUSED) if f"{role}.{part}" in block.roles]
        stacks = {part: self._stack(block.roles[f"{role}.{part}"], layer, experts) for part in present}
        return {part: stack for part, stack in stacks.items() if part in _PARTS}

    def value_ranges(self, block: Block, role: str) -> tuple[Ranges, Ranges]:
        """Indices of the outputs and of the inputs that this rank holds of a weight."""
        spec = block.roles[f"{role}.weight"]
        *_, (first, _), (second, _) = self.plan.cuts.values(spec, self.plan.layout.coordinates(self.rank))
        return (second, first) if spec.transposed else (first, second)

    def _dequantise(self, out: Tensor, block: Block, role: str, layer: int | None, expert: int | None) -> None:
        parts = self.parts(block, role, layer, expert)
        rows, columns = self.value_ranges(block, role)
        held = out[..., : span(rows), : span(columns)]
        if held.shape != out.shape:
            out.zero_()  # a padded axis
        dequantise(held, rows, columns, parts)
        spec = parts["weight"].spec
        self._pad_segments(out.transpose(-1, -2) if spec.transposed else out, spec)
        self._dequantised_bytes += out.nbytes
        self._quantised_bytes += sum(self.shard(part.spec, layer, expert).nbytes for part in parts.values())

    def _stack(self, spec: TensorSpec, layer: int | None, experts: Sequence[int | None]) -> Part:
        """What is stored, without padding; floats as float32."""
        shards = [self.shard(spec, layer, expert) for expert in experts]
        ranges = shards[0].ranges
        dtype = torch.float32 if spec.dtype in FLOATS else self._runtime_dtype(shards[0])
        values = torch.empty(len(shards), *filled_shape(ranges), dtype=dtype, device=self.device)
        for shard in shards:
            self._take(shard)
        self._source.fill_stack(values, shards, self._on_bytes)
        return Part(spec, ranges, values)

    def _runtime_dtype(self, shard: TensorShard) -> torch.dtype:
        if shard.dtype in FLOATS or shard.dtype not in NUMPY:
            return self.dtype
        return BITS.get(shard.dtype) or torch.from_numpy(np.empty(0, NUMPY[shard.dtype])).dtype

    def _take(self, shard: TensorShard) -> None:
        if shard.name in self._taken:
            raise AssertionError(f"tensor {shard.name} is taken twice")
        self._taken.add(shard.name)

    def _fill(self, out: Tensor, shard: TensorShard) -> None:
        self._take(shard)
        filled = filled_shape(shard.ranges)
        if filled != tuple(out.shape):
            out.zero_()  # a padded axis
        self._source.fill(out[tuple(slice(0, n) for n in filled)], shard, self._on_bytes)

    def _pad_segments(self, out: Tensor, spec: TensorSpec) -> None:
        """Of a fused dim (gates, then ups) whose parts are padded, the padding belongs behind each of them."""
        for dim, parts in enumerate(self.plan.cuts.value_parts(spec, self.plan.layout.coordinates(self.rank))):
            if sum(padding > 0 for _, padding in parts) > 1:
                found = out.narrow(dim, 0, sum(held for held, _ in parts)).clone()
                out.zero_()
                start = 0
                for piece, (held, padding) in zip(found.split([held for held, _ in parts], dim), parts, strict=True):
                    out.narrow(dim, start, held).copy_(piece)
                    start += held + padding

    def _on_bytes(self, count: int) -> None:
        self._read_bytes = min(self._read_bytes + count, self._total_bytes)
        self._progress(self._read_bytes, self._total_bytes)


def is_quantised(block: Block, role: str) -> bool:
    """Whether a weight is stored with scales."""
    return f"{role}.scale" in block.roles


def _whole_blocks(shard: TensorShard) -> bool:
    per = STORAGE[shard.dtype][0]
    if filled_shape(shard.ranges) != shard.local_shape:  # a padded axis
        return False
    return len(shard.ranges) == 2 and all(a % per == 0 and b % per == 0 for a, b in shard.ranges[-1])
