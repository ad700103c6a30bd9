"""CUDA groups that have both NCCL and peer-to-peer kernels: each call goes to the one that is faster for it.

The choice depends on world, bytes, dtype and fusion alone, which all ranks share, so all ranks choose alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardwise.comm.base import CommError, Communicator
from shardwise.comm.collective import require_strategy

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNEL_STRATEGIES = ("ONESHOT", "TWOSHOT", "MIN_LATENCY", "LOWPRECISION", "SYMM_MEM")


@dataclass(frozen=True)
class Crossover:
    """Largest payload in bytes for which the kernels beat NCCL, plain and fused, at one world size."""

    plain: int
    fused: int


CROSSOVERS = {
    2: Crossover(plain=64 << 20, fused=64 << 20),
    4: Crossover(plain=8 << 20, fused=16 << 20),
    8: Crossover(plain=1 << 20, fused=4 << 20),
}
"""World 2 measured on 2x H200 (NVLink, CUDA graphs); 4 and 8 scaled by the bytes that one-shot sends to each peer."""


class CudaCommunicator(Communicator):
    """`nccl` for everything, `kernels` (peer-to-peer) for the all-reduces that they do faster."""

    def __init__(self, nccl: Any, kernels: Any | None, reason: str):
        self.nccl = nccl
        self.kernels = kernels
        self.reason = reason
        self.rank, self.size, self.ranks = nccl.rank, nccl.size, nccl.ranks
        self.transport = "p2p" if kernels is not None else "nccl"
        self.name = nccl.name
        self.deadlines = nccl.deadlines
        self._crossover = CROSSOVERS.get(self.size, Crossover(0, 0))

    def why(self) -> str:
        """One line: what moves this group's bytes, and for what reason. The same on all ranks."""
        return f"group {self.name} of {self.size}: {self.transport} ({self.reason})"

    def explain(self, op: str, payload: int) -> str:
        """Which of the two serves `op` on `payload` bytes when the strategy is AUTO, and why."""
        if self.kernels is None or not op.startswith("all_reduce"):
            return f"nccl: {self.reason if self.kernels is None else 'no kernel of ours does it'}"
        limit = self._crossover.fused if op.endswith("norm") else self._crossover.plain
        chosen, relation = ("p2p", "up to") if payload <= limit else ("nccl", "beyond")
        return f"{chosen}: {relation} the measured crossover of {limit} bytes"

    def _choose(self, tensor: Tensor, strategy: str, fused: bool) -> Any:
        if strategy == "AUTO":
            limit = self._crossover.fused if fused else self._crossover.plain
            fits = self.kernels is not None and tensor.dtype in KERNEL_DTYPES
            return self.kernels if fits and tensor.nbytes <= limit else self.nccl
        require_strategy(strategy)
        if strategy == "NCCL":
            return self.nccl
        if self.kernels is None:
            raise CommError(f"strategy {strategy} needs peer-to-peer kernels: {self.reason}; AUTO or NCCL run here")
        return self.kernels

    def all_reduce(self, tensor: Tensor, *, out: Tensor | None = None, strategy: str = "AUTO") -> Tensor:
        return self._choose(tensor, strategy, False).all_reduce(tensor, out=out, strategy=strategy)

    def all_reduce_residual_rms_norm(
        self,
        tensor: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        *,
        weight_bias: float = 0.0,
        strategy: str = "AUTO",
    ) -> tuple[Tensor, Tensor]:
        chosen = self._choose(tensor, strategy, True)
        return chosen.all_reduce_residual_rms_norm(
            tensor, residual, weight, eps, weight_bias=weight_bias, strategy=strategy
        )

    def all_gather(self, tensor: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        return self.nccl.all_gather(tensor, dim, sizes)

    def reduce_scatter(self, tensor: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        return self.nccl.reduce_scatter(tensor, dim, sizes)

    def all_to_all(
        self, tensor: Tensor, send_sizes: Sequence[int] | None = None, recv_sizes: Sequence[int] | None = None
    ) -> Tensor:
        return self.nccl.all_to_all(tensor, send_sizes, recv_sizes)

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        return self.nccl.broadcast(tensor, root)

    def barrier(self) -> None:
        self.nccl.barrier()

    def all_gather_object(self, value: Any) -> list[Any]:
        return self.nccl.all_gather_object(value)

    def split(self, color: int, key: int | None = None) -> Communicator:
        wanted = self.all_gather_object((color, self.rank if key is None else key))
        return self.split_known([c for c, _ in wanted], [k for _, k in wanted])

    def split_known(self, colors: Sequence[int], keys: Sequence[int] | None = None) -> Communicator:
        """`split` where every rank knows the colors and keys of all ranks already."""
        nccl = self.nccl.split_known(colors, keys)
        if nccl.size == 1:
            return nccl
        return with_kernels(nccl, "p2p" if self.kernels is not None else None, self.reason)

    def abort(self, reason: str) -> None:
        if self.kernels is not None:
            self.kernels.abort(reason)
        self.nccl.abort(reason)

    def close(self) -> None:
        if self.kernels is not None:
            self.kernels.close()
        self.nccl.close()


def with_kernels(nccl: Any, transport: str | None, reason: str) -> CudaCommunicator:
    """`nccl` and peer-to-peer kernels of the same ranks; without the kernels, and saying why, where they cannot run."""
    if transport is None:
        return CudaCommunicator(nccl, None, reason)
    from shardwise.comm.p2p.communicator import create

    try:
        kernels = create(nccl.control, transport=transport, fallback=nccl)
    except CommError as error:  # raised by every rank alike
        return CudaCommunicator(nccl, None, str(error))
    return CudaCommunicator(nccl, kernels, f"{nccl.size} GPUs of one host reach each other's memory")
