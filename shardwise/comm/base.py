"""The Communicator: what every transport means, and the errors it raises.

Every rank of a group calls the same methods in the same order with agreeing shapes. Results are new tensors on
the input's device unless `out` is given. Ragged sizes follow `partition.lengths` unless stated.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from shardwise.comm.accumulate import Accumulator

STRATEGIES = (
    "NCCL",
    "MIN_LATENCY",
    "UB",
    "AUTO",
    "ONESHOT",
    "TWOSHOT",
    "LOWPRECISION",
    "MNNVL",
    "NCCL_SYMMETRIC",
    "SYMM_MEM",
)
TRANSPORTS = ("gloo", "nccl", "mpi", "shm", "p2p", "flashinfer", "threads", "fake")


class CommError(RuntimeError):
    """A collective failed; the text names operation, sequence number, group and rank."""


class Unavailable(CommError, ValueError):
    """A transport or strategy asked for by name cannot run here: an input error, not the failure of a rank.

    `exit_code` is the job's, as for a device that is not there.
    """

    exit_code = 2


class CollectiveTimeout(CommError):
    """A rank did not arrive before the deadline; `missing` holds the ranks (of the world) that never came."""

    def __init__(self, text: str, missing: tuple[int, ...] = ()):
        super().__init__(text)
        self.missing = missing


class PeerLost(CommError):
    """A rank's process is gone; `missing` holds the ranks (of the world) that are."""

    def __init__(self, text: str, missing: tuple[int, ...] = ()):
        super().__init__(text)
        self.missing = missing


class CollectiveMismatch(CommError):
    """Ranks disagree on operation, shape, dtype, group or strategy (check mode)."""


class Communicator(ABC):
    """One rank's end of a group."""

    rank: int
    """This rank's place in the group."""
    size: int
    transport: str
    """One of TRANSPORTS."""
    ranks: tuple[int, ...]
    """World ranks of the members, in group order."""

    @abstractmethod
    def all_reduce(self, tensor: "Tensor", *, out: "Tensor | None" = None, strategy: str = "AUTO") -> "Tensor":
        """Sum over the group, in tensor's dtype (bf16/fp16 accumulate in float32). `out=tensor` reduces in place."""

    @abstractmethod
    def all_gather(self, tensor: "Tensor", dim: int = 0, sizes: Sequence[int] | None = None) -> "Tensor":
        """Concatenation over the group along `dim`. `sizes`: each rank's length on `dim`; None means all equal."""

    @abstractmethod
    def reduce_scatter(self, tensor: "Tensor", dim: int = 0, sizes: Sequence[int] | None = None) -> "Tensor":
        """Sum over the group, then this rank's part of `dim`. `sizes` None: `partition.lengths` of the dimension."""

    @abstractmethod
    def all_to_all(
        self, tensor: "Tensor", send_sizes: Sequence[int] | None = None, recv_sizes: Sequence[int] | None = None
    ) -> "Tensor":
        """Rows of dim 0 sent to the members: `send_sizes[j]` rows go to rank j, `recv_sizes[j]` come from it.

        Both None: equal parts, as many rows on every rank. `send_sizes` alone: the counts are exchanged first, through
        the host. With both, nothing is exchanged but the rows: whether they agree is checked in check mode only.
        """

    @abstractmethod
    def broadcast(self, tensor: "Tensor", root: int = 0) -> "Tensor":
        """`tensor` of group rank `root`, into every rank's tensor, which is returned."""

    @abstractmethod
    def barrier(self) -> None:
        """Return when every member has called."""

    @abstractmethod
    def all_reduce_residual_rms_norm(
        self,
        tensor: "Tensor",
        residual: "Tensor",
        weight: "Tensor",
        eps: float,
        *,
        weight_bias: float = 0.0,
        strategy: str = "AUTO",
        out: "Tensor | None" = None,
        residual_out: "Tensor | None" = None,
    ) -> "tuple[Tensor, Tensor]":
        """(rmsnorm(s) * (weight + weight_bias), s) with s = all_reduce(tensor) + residual. [..., H], weight [H].

        `out` and `residual_out` take the two results where they are given; `residual_out` may be `residual`.
        """

    @abstractmethod
    def all_gather_object(self, value: Any) -> list[Any]:
        """Small Python values of all members, in group order (bootstrap and control only)."""

    @abstractmethod
    def split(self, color: int, key: int | None = None) -> "Communicator":
        """Sub-group of the members with the same color, ordered by (key, rank). Called by every member."""

    @abstractmethod
    def split_known(self, colors: Sequence[int], keys: Sequence[int] | None = None) -> "Communicator":
        """`split` where every rank knows the colors and keys of all ranks already; nothing is exchanged for them."""

    def accumulator(self, total: "Tensor") -> "Accumulator":
        """What adds sums over the group to `total`, without the copies of an all-reduce where the transport can."""
        from shardwise.comm.accumulate import Accumulator  # which needs torch

        return Accumulator(self, total)

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """`value` of group rank `root`."""
        return self.all_gather_object(value if self.rank == root else None)[root]

    def check_waits(self) -> None:  # noqa: B027  (most transports have nothing to do here)
        """Raise the error that a wait on the device recorded, also in replays of a graph. Call it after synchronising.

        Transports that wait on the host raise where they wait.
        """

    @abstractmethod
    def abort(self, reason: str) -> None:
        """Unblock every member: their pending and later calls raise CommError with `reason`."""

    @abstractmethod
    def close(self) -> None:
        """Free what the group and the groups split off it hold; idempotent. Every member calls it."""
