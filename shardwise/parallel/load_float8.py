"""Loads weights that stay float8 on a GPU, where a rank's part of them is made of whole tiles or channels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.ops.quantization.float8 import COLUMNS, TILE, Float8Weight
from shardwise.parallel.weight_form import float8_grain, stays_float8
from shardwise.parallel.weights import Weights
from shardwise.sharding import spec
from shardwise.sharding.axes import Range


def float8_weight(
    weights: Weights, block: spec.Block, *roles: str, layer: int | None, order: Tensor | None = None
) -> Float8Weight | None:
    """The roles' weights, joined along the outputs, or in `order`.

    None where one does not stay float8, where some tile is cut, or where `order` mixes rows of several tiles in one.
    """
    parts = [_Part.of(weights, block, role, layer) for role in roles]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts) or len({part.tiled for part in found}) > 1 or not found[0].fits_columns:
        return None
    if found[0].tiled:
        if not (found[-1].whole_but_last and all(part.whole for part in found[:-1])):
            return None
        lines = None if order is None else _tiles_in_order(order)
        if order is not None and lines is None:
            return None
    loaded = [part.take() for part in found]
    codes, scales = (torch.cat(each) if len(each) > 1 else each[0] for each in zip(*loaded, strict=True))
    if order is not None:
        codes = codes.view(torch.uint8)[order].view(codes.dtype)
        scales = scales[lines if found[0].tiled else order]
    return Float8Weight(codes, scales.contiguous())


def float8_experts(
    weights: Weights, block: spec.Moe, layer: int, local: Sequence[int]
) -> tuple[Float8Weight, Float8Weight] | None:
    """(up and gate rows [E, 2I, H], down [E, H, I]) of experts that are stored one by one; None as `float8_weight`.

    Filled one by one, so that no second copy of all experts exists.
    """
    if block.stacked or not block.gated or not local:
        return None
    roles = {role: _Part.of(weights, block, role, layer, local[0]) for role in ("up", "gate", "down")}
    found = [part for part in roles.values() if part is not None]
    if len(found) < 3 or len({part.tiled for part in found}) > 1 or not all(part.fits_columns for part in found):
        return None
    if found[0].tiled and not (found[0].whole and found[1].whole and found[2].whole_but_last):
        return None

    up, _, down = found
    inner, outer = _Stack.of(up, 2, len(local), weights.device), _Stack.of(down, 1, len(local), weights.device)
    for slot, expert in enumerate(local):
        for name, stack, place in (("up", inner, 0), ("gate", inner, 1), ("down", outer, 0)):
            part = _Part.of(weights, block, name, layer, expert)
            assert part is not None
            stack.put(slot, place, *part.take())
    return Float8Weight(inner.codes, inner.scales), Float8Weight(outer.codes, outer.scales)


class _Part:
    """One stored weight and its scales."""

    def __init__(self, weights: Weights, block: spec.Block, role: str, layer: int | None, expert: int | None):
        self._weights, self._block, self._role, self._layer, self._expert = weights, block, role, layer, expert
        shard = weights.shard(block.roles[f"{role}.weight"], layer, expert)
        self.shape = shard.local_shape
        self.tiled = float8_grain(block, role) == "tiles"
        rows, columns = shard.ranges
        exact = all(sum(b - a for a, b in r) == n for r, n in zip(shard.ranges, self.shape, strict=True))
        self.fits_columns = exact and self.shape[1] % COLUMNS == 0 and (not self.tiled or _whole_but_last(columns))
        self.whole_but_last = _whole_but_last(rows)
        """Rows are whole tiles, but for the last of the weight."""
        self.whole = self.whole_but_last and self.shape[0] % TILE == 0

    @classmethod
    def of(
        cls, weights: Weights, block: spec.Block, role: str, layer: int | None, expert: int | None = None
    ) -> "_Part | None":
        """None for a weight that does not stay float8."""
        if not weights.keeps_float8 or not stays_float8(block, role):
            return None
        return cls(weights, block, role, layer, expert)

    def take(self) -> tuple[Tensor, Tensor]:
        """Codes [N, K] and scales, of tiles or channels."""
        weights, block, role, layer, expert = self._weights, self._block, self._role, self._layer, self._expert
        weights.find(block, f"{role}.input_scale", layer=layer, expert=expert)  # inputs are not quantised here
        codes = weights.take(block, f"{role}.weight", layer=layer, expert=expert)
        scales = weights.take(block, f"{role}.scale", layer=layer, expert=expert, dtype=torch.float32)
        if self.tiled:
            return codes, scales
        return codes, scales.reshape(-1).expand(self.shape[0]).contiguous()


@dataclass(frozen=True)
class _Stack:
    """Codes and scales of all experts' matrices, several of a kind in each slot, one behind the other."""

    codes: Tensor
    scales: Tensor

    @classmethod
    def of(cls, part: _Part, matrices: int, experts: int, device: torch.device) -> "_Stack":
        rows, columns = part.shape
        codes = torch.empty(experts, matrices * rows, columns, dtype=torch.float8_e4m3fn, device=device)
        lines, *line = (-(-rows // TILE), -(-columns // TILE)) if part.tiled else (rows,)
        return cls(codes, torch.empty(experts, matrices * lines, *line, device=device))

    def put(self, slot: int, place: int, codes: Tensor, scales: Tensor) -> None:
        for stack, values in ((self.codes.view(torch.uint8), codes.view(torch.uint8)), (self.scales, scales)):
            stack[slot, place * len(values) : (place + 1) * len(values)] = values


def _whole_but_last(ranges: Sequence[Range]) -> bool:
    """Whether ranges begin at tiles and all but the last end at one."""
    return all(start % TILE == 0 for start, _ in ranges) and all(stop % TILE == 0 for _, stop in ranges[:-1])


def _tiles_in_order(order: Tensor) -> Tensor | None:
    """The tile that each tile of rows in `order` comes from; None where one has rows of several."""
    tiles = order // TILE
    first = tiles[::TILE]
    return first if torch.equal(tiles, first.repeat_interleave(TILE)[: len(tiles)]) else None
