"""The collectives as all transports have them: checks arguments, records calls, composes what a transport lacks.

A transport implements the `_`-methods at the ends of `BaseCommunicator` and `Member` on contiguous one-dimensional
tensors and inherits the rest, so that shapes, ragged sizes, errors and records are the same everywhere.
"""

import pickle
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise import partition
from shardwise.comm import arguments, compose, control, watch
from shardwise.comm.arguments import as_bytes
from shardwise.comm.base import CollectiveMismatch
from shardwise.comm.control import MESSAGE_BYTES
from shardwise.comm.member import Member


class BaseCommunicator(Member):
    """Base of the transports."""

    def explain(self, op: str, payload: int) -> str:
        """Which algorithm serves `op` on `payload` bytes (of a gather: joined) when the strategy is AUTO, and why."""
        if op.startswith("all_reduce") and self.deterministic:
            return "TWOSHOT in fixed rank order: deterministic mode has one algorithm for all sizes"
        return f"the only algorithm of transport {self.transport}"

    # The protocol

    def all_reduce(self, tensor: Tensor, *, out: Tensor | None = None, strategy: str = "AUTO") -> Tensor:
        compose.require_summable(tensor.dtype, "all_reduce")
        if strategy != "AUTO":
            self._require(strategy)
        self._require_device(tensor, "all_reduce")
        target = arguments.reduce_target(tensor, out)
        source = (tensor.detach() if tensor.requires_grad else tensor).contiguous()
        entry = self._begin("all_reduce", tensor.shape, tensor.dtype, strategy)
        flat = target if target.is_contiguous() else torch.empty_like(source)
        if source.numel():
            self._reduce(source, flat, strategy)
        else:
            self._empty_call()
        if flat is not target:
            target.copy_(flat)
        entry[watch.END] = watch.now()
        return target if out is None else out

    def all_gather(self, tensor: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        self._require_device(tensor, "all_gather")
        dim = arguments.dimension(tensor, dim, "all_gather")
        sizes = arguments.gather_sizes(tensor, dim, sizes, self.rank, self.size)
        entry = self._begin("all_gather", tensor.shape, tensor.dtype, "", dim, sizes)
        unit, shape = arguments.unit_elements(tensor, dim), list(tensor.shape)
        kernel = self._placing(tensor, sizes)
        if kernel is not None:
            shape[dim] = sum(sizes)
            joined = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
            kernel((tensor.detach() if tensor.requires_grad else tensor).contiguous(), joined, dim)
            entry[watch.END] = watch.now()
            return joined
        counts, width = [size * unit for size in sizes], tensor.element_size()
        bytes_joined = torch.empty(sum(counts) * width, dtype=torch.uint8, device=tensor.device)
        if bytes_joined.numel():
            self._all_gather(as_bytes(tensor), bytes_joined, [count * width for count in counts])
        else:
            self._empty_call()
        entry[watch.END] = watch.now()
        joined = bytes_joined.view(tensor.dtype)
        if dim == 0:
            return joined.view(sum(sizes), *shape[1:])
        parts = zip(joined.split(counts), sizes, strict=True)
        return torch.cat([part.view(*shape[:dim], size, *shape[dim + 1 :]) for part, size in parts], dim)

    def _placing(self, tensor: Tensor, sizes: Sequence[int]) -> Callable[[Tensor, Tensor, int], None] | None:
        """One kernel that lays all ranks' tensors in their places: kernel(tensor, joined, dim) on contiguous tensors.
        None: there is none for these."""
        return None

    def reduce_scatter(self, tensor: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        compose.require_summable(tensor.dtype, "reduce_scatter")
        self._require_device(tensor, "reduce_scatter")
        dim = arguments.dimension(tensor, dim, "reduce_scatter")
        sizes = arguments.scatter_sizes(tensor, dim, sizes, self.size)
        entry = self._begin("reduce_scatter", tensor.shape, tensor.dtype, "", dim, sizes)
        unit = arguments.unit_elements(tensor, dim)
        shape = (*tensor.shape[:dim], sizes[self.rank], *tensor.shape[dim + 1 :])
        mine = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
        if tensor.numel():
            if dim == 0:
                joined = tensor.detach().contiguous().view(-1)
            else:
                joined = torch.cat([piece.reshape(-1) for piece in tensor.detach().split(list(sizes), dim)])
            self._reduce_scatter(joined, [size * unit for size in sizes], mine.view(-1))
        else:
            self._empty_call()
        entry[watch.END] = watch.now()
        return mine

    def all_to_all(
        self, tensor: Tensor, send_sizes: Sequence[int] | None = None, recv_sizes: Sequence[int] | None = None
    ) -> Tensor:
        self._require_device(tensor, "all_to_all")
        sends, receives = arguments.exchanged_sizes(tensor, send_sizes, recv_sizes, self.size)
        entry = self._begin("all_to_all", tensor.shape[1:], tensor.dtype, "")
        longest = sends[0] if send_sizes is None else None
        if receives is None or self.check:
            table = self._exchange_sizes(sends, receives)
            found, longest = tuple(row[self.rank] for row in table), max(map(max, table))
            if receives not in (None, found):
                raise self._fail(
                    CollectiveMismatch(f"{self._where(entry)}: recv_sizes {receives}, but the peers send {found} rows")
                )
            receives = found
        result = torch.empty((sum(receives), *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
        row_bytes = arguments.unit_elements(tensor, 0) * tensor.element_size()
        if row_bytes:
            sent, taken = ([count * row_bytes for count in counts] for counts in (sends, receives))
            most = None if longest is None else longest * row_bytes
            self._all_to_all(as_bytes(tensor), as_bytes(result), sent, taken, most)
        else:
            self._empty_call()
        entry[watch.END] = watch.now()
        return result

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        self._require_device(tensor, "broadcast")
        if not 0 <= root < self.size:
            raise ValueError(f"broadcast: root {root} is not a rank of a group of {self.size}")
        entry = self._begin("broadcast", tensor.shape, tensor.dtype, "", root)
        flat = tensor.detach() if tensor.is_contiguous() else tensor.detach().contiguous()
        if flat.numel():
            self._broadcast(as_bytes(flat), root)
        else:
            self._empty_call()
        if not tensor.is_contiguous() and self.rank != root:
            tensor.detach().copy_(flat)
        entry[watch.END] = watch.now()
        return tensor

    def barrier(self) -> None:
        entry = self._begin("barrier", (), "", "")
        self._barrier()
        entry[watch.END] = watch.now()

    def all_reduce_residual_rms_norm(
        self,
        tensor: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        *,
        weight_bias: float = 0.0,
        strategy: str = "AUTO",
        out: Tensor | None = None,
        residual_out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        compose.check_norm_arguments(tensor, residual, weight, out, residual_out)
        if strategy != "AUTO":
            self._require(strategy)
        self._require_device(tensor, "all_reduce_residual_rms_norm")
        kernel = self._fused(tensor, residual, weight, weight_bias, strategy, out, residual_out)
        if kernel is None:
            reduced = self.all_reduce(tensor, strategy=strategy)
            return compose.residual_rms_norm(reduced, residual, weight, eps, weight_bias, out, residual_out)
        entry = self._begin("all_reduce_residual_rms_norm", tensor.shape, tensor.dtype, strategy, eps, weight_bias)
        x, residual, weight = tensor.contiguous(), residual.contiguous(), weight.contiguous()
        normed = torch.empty_like(x) if out is None else out
        total = torch.empty_like(x) if residual_out is None else residual_out
        if x.numel():
            kernel(x, residual, weight, eps, weight_bias, normed, total)
        entry[watch.END] = watch.now()
        return normed, total

    def _fused(
        self, tensor: Tensor, residual: Tensor, weight: Tensor, weight_bias: float, strategy: str,
        out: Tensor | None, residual_out: Tensor | None,
    ) -> Callable[..., None] | None:  # fmt: skip
        """One kernel for sum, residual and norm: kernel(x, residual, weight, eps, weight_bias, out, residual_out) on
        contiguous tensors. None: there is none for these."""
        return None

    def all_gather_object(self, value: Any) -> list[Any]:
        entry = self._begin("all_gather_object", (), "", "")
        blob = pickle.dumps(value)
        length = control.number(len(blob))
        inline = MESSAGE_BYTES - len(length)  # what a message carries beside the length
        messages = self._exchange(length + blob[:inline])
        self._require_objects(entry, messages)
        counts = [control.numbers(message[: len(length)])[0] for message in messages]
        blobs = [message[len(length) :] for message in messages]
        if max(counts) > inline:
            joined = torch.empty(sum(counts), dtype=torch.uint8, device="cpu")
            self._gather_control(torch.frombuffer(bytearray(blob), dtype=torch.uint8), joined, counts)
            blobs = [part.numpy().tobytes() for part in joined.split(counts)]
        entry[watch.END] = watch.now()
        return [pickle.loads(each) for each in blobs]

    def _require_objects(self, entry: list, messages: list[bytes]) -> None:
        """A rank that called something else has sent no object."""
        for rank, message in zip(self.ranks, messages, strict=True):
            if not message:
                raise self._fail(
                    CollectiveMismatch(
                        f"{self._where(entry)}: rank {rank} called something else; with SHARDWISE_CHECK=1 both calls "
                        "are named"
                    )
                )

    # For transports

    def _reduce(self, source: Tensor, target: Tensor, strategy: str) -> None:
        """Contiguous tensors of one shape: a view takes the host as long as a look-up, and kernels need none."""
        source, target = source.view(-1), target.view(-1)
        if strategy in ("ONESHOT", "MIN_LATENCY"):
            self._reduce_one_shot(source, target)
        elif strategy == "TWOSHOT" or self.deterministic:
            self._reduce_two_shot(source, target)
        else:
            self._all_reduce(source, target)

    def _reduce_one_shot(self, source: Tensor, target: Tensor) -> None:
        gathered = torch.empty((self.size, source.numel()), dtype=source.dtype, device=source.device)
        self._all_gather(as_bytes(source), as_bytes(gathered), [source.numel() * source.element_size()] * self.size)
        compose.ordered_sum(list(gathered), target)

    def _reduce_two_shot(self, source: Tensor, target: Tensor) -> None:
        counts = partition.lengths(source.numel(), self.size)
        mine = torch.empty(counts[self.rank], dtype=source.dtype, device=source.device)
        self._ordered_reduce_scatter(source, counts, mine)
        width = source.element_size()
        self._all_gather(as_bytes(mine), as_bytes(target), [count * width for count in counts])

    def _ordered_reduce_scatter(self, joined: Tensor, counts: Sequence[int], target: Tensor) -> None:
        """Reduce-scatter with this package's order of summation, whatever the library underneath does."""
        width = joined.element_size()
        received = torch.empty((self.size, target.numel()), dtype=joined.dtype, device=joined.device)
        sends = [count * width for count in counts]
        self._all_to_all(as_bytes(joined), as_bytes(received), sends, [sends[self.rank]] * self.size, max(sends))
        if target.numel():
            compose.ordered_sum(list(received), target)

    def _exchange_sizes(self, sends: tuple[int, ...], receives: tuple[int, ...] | None) -> list[tuple[int, ...]]:
        """Row i: how many rows rank i sends to each member. `receives` serves the transport that has no peers."""
        return [control.numbers(row) for row in self._exchange_long(b"".join(map(control.number, sends)))]

    def _longest(self, sends: Sequence[int]) -> int:
        """Of what all ranks send to each other, the most: for a transport that must know it."""
        return max(control.numbers(each)[0] for each in self._exchange(control.number(max(sends))))

    def _exchange_long(self, blob: bytes) -> list[bytes]:
        """Everyone's control message of any length, the same for all, in pieces that `_exchange` takes."""
        pieces = [self._exchange(blob[i : i + MESSAGE_BYTES]) for i in range(0, len(blob), MESSAGE_BYTES)]
        return [b"".join(piece[rank] for piece in pieces) for rank in range(self.size)]

    def _gather_control(self, source: Tensor, joined: Tensor, counts: Sequence[int]) -> None:
        """`_all_gather` for bytes on the CPU; a transport that moves only CUDA tensors overrides it."""
        self._all_gather(source, joined, counts)

    @abstractmethod
    def _all_reduce(self, source: Tensor, target: Tensor) -> None:
        """Sum of all ranks' `source` into `target`, the same length and dtype, perhaps the same memory."""

    @abstractmethod
    def _all_gather(self, source: Tensor, joined: Tensor, counts: Sequence[int]) -> None:
        """Bytes: rank i's `source` of counts[i] into its place in `joined`, on every rank."""

    def _reduce_scatter(self, joined: Tensor, counts: Sequence[int], target: Tensor) -> None:
        """Sum over the ranks of the part of `joined` that is this rank's (counts[rank] elements) into `target`."""
        self._ordered_reduce_scatter(joined, counts, target)

    @abstractmethod
    def _all_to_all(
        self, source: Tensor, target: Tensor, sends: Sequence[int], receives: Sequence[int], longest: int | None
    ) -> None:
        """Bytes: sends[j] of `source` go to rank j, receives[j] of `target` come from it, both in rank order.

        longest  the most that any rank sends to another, alike on all ranks; None: not known (`_longest` asks)
        """

    @abstractmethod
    def _broadcast(self, data: Tensor, root: int) -> None:
        """Bytes of `root`'s data into everyone's."""

    @abstractmethod
    def _barrier(self) -> None: ...

    @abstractmethod
    def _exchange(self, blob: bytes) -> list[bytes]:
        """Everyone's control message of at most MESSAGE_BYTES, in group order; lengths may differ."""
