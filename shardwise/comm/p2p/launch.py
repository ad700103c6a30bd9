"""From tensors to kernel launches: rows, lanes, warps and grid of a call."""

import threading
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardwise.comm.arguments import as_bytes
from shardwise.comm.p2p import fp8
from shardwise.comm.p2p.bulk import STAGE_BYTES
from shardwise.comm.p2p.gather import DATA_BYTES, gather
from shardwise.comm.p2p.one_shot import one_shot
from shardwise.comm.p2p.spread import CHUNK_BYTES, Rows, are_aligned, plain_rows, token_rows
from shardwise.comm.p2p.table import GATHER, Tuning
from shardwise.comm.p2p.two_shot import two_shot
from shardwise.comm.p2p.workspace import COUNTERS, Workspace
from shardwise.kernel_start import Start, start_of

FP8_LANES = 128
_WEIGHT = 2
"""Place among a kernel's tensors: each piece of a call takes all of it."""
_REGISTERS, _THREADS, _BLOCKS, _SHARED_BYTES = 65536, 2048, 32, 227 << 10
"""What one multiprocessor of Hopper holds."""
LAST_ROWS = 4
"""Rows that a pushing block of two-shot finishes at the end: with one 256 x 7168 takes 26 us, so 24 (four H200)."""
KEPT = 4096
"""Calls whose launches are kept; prompts come in many lengths."""
_NO_NORM = (0.0, 0.0)
"""What plain sums give for eps and weight_bias."""
_SHARED_RESERVE = 3 << 10
"""What a block takes of it beside the stage: the system's KiB, and sums across warps."""


@dataclass(frozen=True)
class Ready:
    """A kernel that is compiled, and what its calls have in common."""

    kernel: Start
    options: dict[str, Any]
    constants: tuple
    """The kernel's constexpr arguments, which a launch passes after the others."""
    resident: int
    """Blocks that the device holds at once: a wait must never keep its partner from starting."""


@dataclass(frozen=True)
class Piece:
    """A launch that serves a call or a part of it, but for addresses and deadline."""

    ready: Ready
    grid: int
    numbers: tuple[float, ...]
    """Rows, their width, elements, chunks of a row; of two-shot also its blocks that push, and from which turn on these
    take sums; `_NO_NORM` of plain ones. Of a gather: rows, bytes that stay together, bytes."""
    extent: slice | None = None
    """Elements of the tensors; None: all."""
    fused: bool = False

    def of(self, tensors: Sequence[Tensor], extent: slice) -> Sequence[Tensor]:
        return [
            tensor if self.fused and place == _WEIGHT else tensor.view(-1)[extent]
            for place, tensor in enumerate(tensors)
        ]


Pieces = tuple[Piece, ...]


def places(workspace: Workspace) -> tuple:
    """What every kernel gets of the workspace."""
    return (
        *(workspace.slots, workspace.counters, workspace.abort),
        *(workspace.records.data_ptr(), workspace.region_bytes),
    )


_compiling = threading.Lock()
"""Triton compiles for one thread at a time; ranks may be threads."""


class Launcher:
    """Launches on one workspace. Tensors are contiguous and lie on the workspace's device."""

    side_by_side = True
    """False: the blocks of a launch run one after another."""

    def __init__(self, workspace: Workspace, deadline_seconds: float, pdl: bool | None = None):
        self.workspace = workspace
        self.deadline_ns = int(deadline_seconds * 1e9)
        properties = torch.cuda.get_device_properties(workspace.device)
        self.multiprocessors = properties.multi_processor_count
        # Blocks of the next launch that wait where another rank's blocks must run would keep those from starting.
        self.pdl = (properties.major >= 9 if pdl is None else pdl) and workspace.sharers == 1
        self._kernels: dict[tuple, Ready] = {}
        self._kept: dict[Hashable, Pieces] = {}
        self._places = places(workspace)
        self._addresses = tuple(each.data_ptr() if isinstance(each, Tensor) else each for each in self._places)

    def all_reduce(self, x: Tensor, out: Tensor, tuning: Tuning, *, launch: bool = True) -> Pieces:
        """out = sum of x over the ranks. Same shape and dtype; `out` may be `x`. `launch=False` compiles only."""
        tensors = (x, x, x, out, out)
        pieces = self._pieces(x.numel(), tensors, tuning, False)
        return self.launch(pieces, tensors) if launch else pieces

    def fused(
        self,
        x: Tensor,  # [T, H]
        residual: Tensor,  # [T, H]
        weight: Tensor,  # [H]
        eps: float,
        weight_bias: float,
        out: Tensor,  # [T, H]
        residual_out: Tensor,  # [T, H]; may be `residual`
        tuning: Tuning,
        *,
        launch: bool = True,
    ) -> Pieces:
        """residual_out = sum of x over the ranks + residual; out = its RMSNorm times (weight + weight_bias)."""
        tensors = (x, residual, weight, out, residual_out)
        pieces = self._pieces(x.shape, tensors, tuning, True)
        return self.launch(pieces, tensors, (eps, weight_bias)) if launch else pieces

    def low_precision(self, x: Tensor, out: Tensor) -> None:
        """out = sum of x over the ranks, each sent as e4m3 (fp8.py). Flat, bfloat16 or float16; `out` may be `x`."""
        row_values = FP8_LANES * fp8.LANE_VALUES
        limit = self.workspace.region_bytes // (FP8_LANES * fp8.LANE_CHUNKS * CHUNK_BYTES)
        if limit < 1:
            raise ValueError(f"region_bytes {self.workspace.region_bytes} is too small for strategy LOWPRECISION")
        for first in range(0, x.numel(), limit * row_values):
            part, target = (tensor[first : first + limit * row_values] for tensor in (x, out))
            self._launch_fp8(part, target, -(-part.numel() // row_values))

    def _launch_fp8(self, x: Tensor, out: Tensor, rows: int) -> None:
        aligned = are_aligned((x, out)) and x.numel() * x.element_size() % CHUNK_BYTES == 0
        numbers = (self.deadline_ns, rows, x.numel())
        with self.workspace.on_device():
            key = (x.dtype, aligned)
            ready = self._kernels.get(key)
            if ready is None:
                options = self._options(FP8_LANES, aligned, {}, 0, FP8_LANES // 32)
                positional = (x, out, *self._places, *numbers)
                ready = self._kernels[key] = self._compiled(fp8.one_shot_fp8, positional, options)
            self._start(ready, min(rows, ready.resident, COUNTERS), (x, out), numbers)

    def gather(self, x: Tensor, out: Tensor, stretch: int, *, launch: bool = True) -> Pieces:
        """out [n, ranks, stretch] = the x [n, stretch] of all ranks, both in bytes, of any shapes and type."""
        tensors = as_bytes(x), as_bytes(out)
        total = tensors[0].numel()
        rows = -(-total // (GATHER.lanes * DATA_BYTES))
        aligned = stretch % DATA_BYTES == 0 and are_aligned(tensors)
        key = (GATHER, aligned)
        with self.workspace.on_device():
            ready = self._kernels.get(key)
            if ready is None:
                options = self._options(GATHER.lanes, aligned, {}, GATHER.pausing, GATHER.warps)
                positional = (*tensors, *self._places, self.deadline_ns, rows, stretch, total)
                ready = self._kernels[key] = self._compiled(gather, positional, options)
        pieces = (Piece(ready, min(rows, self._room(ready, GATHER)), (rows, stretch, total)),)
        return self.launch(pieces, tensors) if launch else pieces

    def gathers(self, nbytes: int) -> bool:
        """True when one call can take `nbytes` of each rank."""
        return -(-nbytes // DATA_BYTES) * CHUNK_BYTES <= self.workspace.region_bytes

    def fits(self, x: Tensor, tuning: Tuning) -> bool:
        """True when a call can take at least one row of x [..., H]."""
        return self.rows_that_fit(-(-x.shape[-1] * x.element_size() // CHUNK_BYTES) * CHUNK_BYTES, tuning.strategy) > 0

    def rows_that_fit(self, row_bytes: int, strategy: str) -> int:
        """Rows that one call may have."""
        rows = self.workspace.region_bytes // row_bytes
        return rows if strategy == "ONESHOT" else rows // 2 * self.workspace.size

    def launch(
        self, pieces: Pieces, tensors: Sequence[Tensor], norm: tuple[float, ...] = (),
        addresses: Sequence[int] | None = None,
    ) -> Pieces:  # fmt: skip
        """What a call returned, on tensors of the same layout, whose addresses may be known.

        norm  eps and weight_bias of fused ones
        """
        with self.workspace.on_device():
            for piece in pieces:
                numbers = (self.deadline_ns, *piece.numbers, *norm)
                if piece.extent is None:
                    self._start(piece.ready, piece.grid, tensors, numbers, addresses)
                else:
                    self._start(piece.ready, piece.grid, piece.of(tensors, piece.extent), numbers)
        return pieces

    def _pieces(self, size: Hashable, tensors: Sequence[Tensor], tuning: Tuning, fused: bool) -> Pieces:
        """`size`: number of elements, or the shape when fused."""
        key = (size, tensors[0].dtype, are_aligned(tensors), tuning)
        pieces = self._kept.get(key)
        if pieces is None:
            if len(self._kept) >= KEPT:
                self._kept.clear()
            with self.workspace.on_device():
                pieces = self._kept[key] = tuple(self._cut(tensors, tuning, fused, key[2]))
        return pieces

    def _cut(self, tensors: Sequence[Tensor], tuning: Tuning, fused: bool, aligned: bool) -> Iterator[Piece]:
        """The launches of a call: one, or as many as the workspace's region asks for."""
        x = tensors[0]
        rows = (
            token_rows(x.numel(), x.shape[-1], x.element_size(), aligned)
            if fused
            else plain_rows(x.numel(), x.element_size(), tuning.lanes, aligned)
        )
        limit = self.rows_that_fit(rows.chunks * CHUNK_BYTES, tuning.strategy)
        if limit < 1:
            raise ValueError(
                f"a row of {rows.chunks * CHUNK_BYTES} bytes does not fit the workspace's region of "
                f"{self.workspace.region_bytes} bytes: make the communicator with a larger region_bytes"
            )
        key = (x.dtype, rows.lanes, rows.aligned, fused, tuning)
        ready = self._kernels.get(key)
        if ready is None:
            sizes = (rows.count, rows.width, rows.total, rows.chunks, *self._roles(rows.count, 1, tuning)[1])
            numbers = (self.deadline_ns, *sizes, *_NO_NORM)
            ready = self._kernels[key] = self._ready(rows, tuning, (*tensors, *self._places, *numbers), fused)
        room, norm = self._room(ready, tuning), () if fused else _NO_NORM
        for first in range(0, rows.count, limit):
            count = min(limit, rows.count - first)
            start, stop = first * rows.width, min(rows.total, (first + count) * rows.width)
            grid, roles = self._roles(count, room, tuning)
            extent = None if count == rows.count else slice(start, stop)
            yield Piece(ready, grid, (count, rows.width, stop - start, rows.chunks, *roles, *norm), extent, fused)

    def _room(self, ready: Ready, tuning: Tuning) -> int:
        """Blocks that a launch may have."""
        return min(ready.resident, tuning.blocks_per_sm * self.multiprocessors, COUNTERS)

    def _roles(self, rows: int, room: int, tuning: Tuning) -> tuple[int, tuple[int, ...]]:
        """(blocks of a launch, at most `room`; of two-shot what its blocks do, as `Piece.numbers` goes on)."""
        if tuning.strategy == "ONESHOT":
            return min(rows, room), ()
        peers = self.workspace.size - 1
        turns = -(-rows // self.workspace.size)
        adders = min(turns, max(room - tuning.pushers, (room + 3) // 4))
        pushers = max(1, min(tuning.pushers, turns * peers, room - adders))
        grid = min(room, pushers + adders)
        late = pushers // peers * LAST_ROWS if self.side_by_side and grid > pushers else 0
        return grid, (pushers, max(0, turns - late))

    def _ready(self, rows: Rows, tuning: Tuning, positional: tuple, fused: bool) -> Ready:
        kernel = one_shot if tuning.strategy == "ONESHOT" else two_shot
        form = {"FUSED": fused, **self._pushing(rows, tuning)}
        warps = min(tuning.warps, rows.lanes // 32)
        options = self._options(rows.lanes, rows.aligned, form, tuning.pausing, warps)
        if tuning.registers and rows.aligned and rows.lanes == 32 * warps:
            options["maxnreg"] = tuning.registers
        return self._compiled(kernel, positional, options)

    def _options(self, lanes: int, aligned: bool, form: dict[str, int | bool], pausing: int, warps: int) -> dict:
        """Constants in the order of the kernels' arguments, then the compiler's options."""
        return {
            "WORLD": self.workspace.size,
            "RANK": self.workspace.rank,
            "LANES": lanes,
            "ALIGNED": aligned,
            **form,
            "PAUSING": pausing,
            "PDL": self.pdl,
            "num_warps": warps,
            "launch_pdl": self.pdl,
        }

    def _pushing(self, rows: Rows, tuning: Tuning) -> dict[str, int | bool]:
        """The options that say how a kernel pushes."""
        one = tuning.strategy == "ONESHOT"
        staged = 1 + tuning.ahead if one else 2
        bulk = tuning.bulk and rows.aligned and staged * rows.lanes * CHUNK_BYTES <= STAGE_BYTES
        return {"AHEAD": tuning.ahead, "BULK": bulk} if one else {"BULK": bulk}

    def _compiled(self, kernel, positional: tuple, options: dict[str, Any]) -> Ready:
        with _compiling:
            compiled = kernel.warmup(*positional, grid=(1,), **options)
            compiled._init_handles()
        threads = 32 * options["num_warps"]
        registers = max(8, -(-compiled.n_regs // 8) * 8)
        per_sm = min(_REGISTERS // (registers * threads), _THREADS // threads, _BLOCKS)
        if options.get("BULK"):
            per_sm = min(per_sm, _SHARED_BYTES // (STAGE_BYTES + _SHARED_RESERVE))
        constants = tuple(value for name, value in options.items() if name.isupper())
        return Ready(
            start_of(compiled), options, constants, max(1, per_sm * self.multiprocessors // self.workspace.sharers)
        )

    def _start(
        self, ready: Ready, grid: int, tensors: Sequence[Tensor], numbers: tuple, addresses: Iterable[int] | None = None
    ) -> None:
        """Past Triton's look-up of the compiled kernel, which takes longer than the rest of a launch. By addresses: of
        each tensor Triton asks the driver where it lies."""
        start, stream_of, rest = ready.kernel
        addresses = addresses or map(Tensor.data_ptr, tensors)
        stream = stream_of(self.workspace.device)
        start(grid, 1, 1, stream, *rest, *addresses, *self._addresses, *numbers, *ready.constants)
