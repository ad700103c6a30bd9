"""Transport `p2p`: all-reduce, plain and fused with residual add and RMSNorm, and small gathers on our own kernels.

A kernel waits at most for the group's deadline. That a wait gave up is seen at the next call, or by `check_waits()`
after the stream was synchronised, which is also what tells of a captured graph's replays.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shardwise.comm import arguments
from shardwise.comm.base import CollectiveTimeout, CommError
from shardwise.comm.collective import BaseCommunicator
from shardwise.comm.p2p import table
from shardwise.comm.p2p.delegate import FALLBACK_STRATEGIES, Delegating, WithoutKernels
from shardwise.comm.p2p.plans import Plans, stretch_bytes
from shardwise.comm.p2p.streams import SingleFlight, StreamOrder
from shardwise.comm.p2p.table import DTYPES, HALVES, Tuning
from shardwise.comm.p2p.workspace import P2PUnavailable, Workspace

if TYPE_CHECKING:
    from shardwise.comm.p2p.launch import Launcher

LOW_PRECISION = "LOWPRECISION"
_ANY_DTYPE = ("AUTO", *FALLBACK_STRATEGIES)
"""Strategies that take what the kernels do not sum, too."""
_NO_LAUNCH = (*FALLBACK_STRATEGIES, LOW_PRECISION)
"""Strategies that no launch of the table serves."""
KEPT = 4096
"""Shapes whose launch is kept; prompts come in many lengths."""
SELF_TEST_SECONDS = 10.0
_SELF_TEST_WORDS = 256


class P2PCommunicator(Delegating):
    """One rank's end of a group of GPUs that write into each other's memory."""

    def __init__(self, fallback: BaseCommunicator, workspace: Workspace, launcher: "Launcher"):
        """On a workspace of `fallback`'s ranks; `connect` makes both. `fallback` does all that the kernels do not."""
        super().__init__(fallback, "p2p")
        self.strategies = (*self.strategies, LOW_PRECISION)
        self.workspace = workspace
        self.launcher = launcher
        self._flight = SingleFlight(self)
        self._device = workspace.counters.device
        self._order = StreamOrder(self._device)
        self._fused_tunings: dict[tuple, Tuning | None] = {}
        self._plans = Plans(self)

    @classmethod
    def connect(cls, fallback: BaseCommunicator, *, region_bytes: int | None = None) -> "P2PCommunicator":
        """Every rank of `fallback` calls it, with its GPU as the current device.

        region_bytes  workspace for one peer; 2 * (size - 1) times that is allocated. Larger calls go in pieces
        Raises P2PUnavailable on every rank when one cannot, or when the links fail their test.
        """
        workspace = Workspace(fallback, region_bytes=region_bytes)
        from shardwise.comm.p2p.launch import Launcher  # triton is there: every rank has just said so

        group = cls(fallback, workspace, Launcher(workspace, SELF_TEST_SECONDS))
        group.test_links()
        group.reason = f"CUDA IPC between {group.size} GPUs of one host, links tested"
        return group

    @classmethod
    def or_fallback(cls, fallback: BaseCommunicator) -> BaseCommunicator:
        """The group on these kernels where they run, else on `fallback` alone; its sub-groups may have them then."""
        try:
            return cls.connect(fallback)
        except P2PUnavailable as error:
            return WithoutKernels(fallback, str(error), cls.or_fallback)

    def explain(self, op: str, payload: int) -> str:
        if op == "all_gather":
            choice = table.choose_gather(self.size, payload // self.size)
            return choice.reason if choice.tuning else f"{self.fallback.transport} {choice.reason}"
        if not op.startswith("all_reduce"):
            return f"{self.fallback.transport}: no kernel of this package does it"
        strategy = "MIN_LATENCY" if self.deterministic else "AUTO"
        return table.choose(self.size, payload, op.endswith("norm"), strategy).reason

    def all_reduce(self, tensor: Tensor, *, out: Tensor | None = None, strategy: str = "AUTO") -> Tensor:
        planned = out is None or out is tensor
        total = self._plans.all_reduce(tensor, strategy, out is tensor) if planned else None
        if total is not None:
            return total
        if strategy not in _ANY_DTYPE:
            self._require(strategy)
            _require_dtype(tensor, strategy, HALVES if strategy == LOW_PRECISION else DTYPES)
        total = super().all_reduce(tensor, out=out, strategy=strategy)
        tuning = self._tuning(tensor, strategy, fused=False) if planned else None
        if tuning is not None:
            self._plans.keep_all_reduce(tensor, total, strategy, tuning)
        return total

    def all_gather(self, tensor: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        joined = self._plans.all_gather(tensor, dim, sizes)
        if joined is None:
            joined = super().all_gather(tensor, dim, sizes)
            if self._gathers(tensor):
                lengths = arguments.gather_sizes(tensor, dim, sizes, self.rank, self.size)
                if len(set(lengths)) == 1:
                    self._plans.keep_all_gather(tensor, joined, dim, sizes, lengths)
        return joined

    def all_reduce_residual_rms_norm(
        self, tensor, residual, weight, eps, *, weight_bias=0.0, strategy="AUTO", out=None, residual_out=None
    ):
        tensors, norm, planned = (tensor, residual, weight), (eps, weight_bias), out is None and residual_out is None
        results = self._plans.fused(tensors, norm, strategy) if planned else None
        if results is None:
            results = super().all_reduce_residual_rms_norm(
                *tensors, eps, weight_bias=weight_bias, strategy=strategy, out=out, residual_out=residual_out
            )
            tuning = self._fused_tunings.get(self._fused_key(tensor, strategy))
            if planned and tuning is not None and weight.dtype == tensor.dtype:
                self._plans.keep_fused(tensors, norm, results, strategy, tuning)
        return results

    def _gathers(self, tensor: Tensor) -> bool:
        """Whether our kernel takes tensors of this size, where all ranks' are of one."""
        nbytes = tensor.numel() * tensor.element_size()
        wanted = table.choose_gather(self.size, nbytes).tuning is not None
        return wanted and nbytes > 0 and self.launcher.gathers(nbytes)

    def _placing(self, tensor, sizes):
        return self._gather if len(set(sizes)) == 1 and self._gathers(tensor) else None

    def _gather(self, tensor: Tensor, joined: Tensor, dim: int) -> None:
        with self._flight:
            self.launcher.gather(tensor, joined, stretch_bytes(tensor, dim))

    def _fused(self, tensor, residual, weight, weight_bias, strategy, out, residual_out):
        key = self._fused_key(tensor, strategy)
        try:
            tuning = self._fused_tunings[key]
        except KeyError:
            tuning = self._fused_tunings[key] = self._fused_tuning(tensor, strategy)
        if tuning is None or weight.dtype != tensor.dtype:
            return None

        def kernel(x, residual, weight, eps, weight_bias, normed, total) -> None:
            with self._flight:
                self.launcher.fused(x, residual, weight, eps, weight_bias, normed, total, tuning)

        return kernel

    def _fused_key(self, tensor: Tensor, strategy: str) -> tuple:
        return tensor.shape, tensor.dtype, strategy, self.deterministic

    def _fused_tuning(self, tensor: Tensor, strategy: str) -> Tuning | None:
        """How a fused call is launched; None where no kernel takes it."""
        if strategy not in _ANY_DTYPE:
            _require_dtype(tensor, strategy, HALVES if strategy == LOW_PRECISION else DTYPES)
        if len(self._fused_tunings) >= KEPT:
            self._fused_tunings.clear()
        tuning = self._tuning(tensor, strategy, fused=True)
        return tuning if tuning is not None and self.launcher.fits(tensor, tuning) else None

    def check_waits(self) -> None:
        """Raise CollectiveTimeout if a kernel gave up waiting, CommError if a peer's abort ended it.

        Call it after synchronising, also after replays of a graph.
        """
        try:
            self.workspace.check()
        except CommError as error:
            if self.broken is None:
                raise self._fail(error) from None
            raise

    def synchronize(self) -> None:
        """Wait for this rank's stream, then `check_waits`."""
        self.workspace.synchronize()
        self.check_waits()

    def _begin(self, op: str, shape, dtype, strategy: str, *details) -> list:
        self.check_waits()
        self._order.take()
        return super()._begin(op, shape, dtype, strategy, *details)

    def _require_device(self, tensor: Tensor, op: str) -> None:
        if tensor.device == self._device:  # each call asks
            return
        super()._require_device(tensor, op)
        raise TypeError(
            f"{op} on group {self.name}: the tensor is on {tensor.device}, this rank's peer-to-peer memory on "
            f"{self._device}"
        )

    def _tuning(self, tensor: Tensor, strategy: str, fused: bool) -> Tuning | None:
        """How our kernels are launched; None where the call goes to the fallback group, or is fp8."""
        if strategy in _NO_LAUNCH or (tensor.dtype not in DTYPES and strategy == "AUTO"):
            return None
        wanted = "MIN_LATENCY" if self.deterministic and strategy == "AUTO" else strategy
        return table.choose(self.size, tensor.numel() * tensor.element_size(), fused, wanted).tuning

    def _reduce(self, source: Tensor, target: Tensor, strategy: str) -> None:
        tuning = self._tuning(source, strategy, fused=False)
        if strategy == LOW_PRECISION:
            with self._flight:
                self.launcher.low_precision(source.view(-1), target.view(-1))
        elif tuning is None:
            self.fallback._reduce(source, target, strategy)
        else:
            with self._flight:
                self.launcher.all_reduce(source, target, tuning)

    def _barrier(self) -> None:
        self.synchronize()
        super()._barrier()

    def test_links(self) -> None:
        """Each rank sends what only it can send; who receives something else, or nothing, names the link.

        Raises P2PUnavailable on every rank, and gives the workspace back, when a link fails.
        """
        device = self.workspace.counters.device
        x = torch.zeros(self.size, _SELF_TEST_WORDS, device=device)
        x[self.rank] = torch.arange(1, _SELF_TEST_WORDS + 1, device=device) * (self.ranks[self.rank] + 1)
        out = torch.empty_like(x)
        tuning = Tuning("ONESHOT", warps=4, lanes=128)
        self.launcher.all_reduce(x, out, tuning, launch=False)
        self.fallback.all_gather_object(None)  # the deadline must not run while a peer still compiles
        self.launcher.all_reduce(x, out, tuning)
        self.workspace.synchronize()
        reports = [text for texts in self.fallback.all_gather_object(self._broken_links(out)) for text in texts]
        if reports:
            self.workspace.close()
            raise P2PUnavailable("GPU peer-to-peer is disabled, its self-test failed: " + "; ".join(reports))

    def _broken_links(self, out: Tensor) -> list[str]:
        here = self.ranks[self.rank]
        try:
            self.workspace.check()
        except CollectiveTimeout as error:
            return [f"rank {here} received nothing from rank {rank}" for rank in error.missing]
        expected = torch.arange(1, _SELF_TEST_WORDS + 1, dtype=torch.float32, device="cpu")
        rows = out.cpu()
        return [
            f"rank {here} received wrong data from rank {rank}"
            for place, rank in enumerate(self.ranks)
            if not torch.equal(rows[place], expected * (rank + 1))
        ]

    def _split(self, name: str, members: list[int], colors: list[int], keys: list[int]) -> BaseCommunicator:
        return self.or_fallback(self._split_fallback(name, colors, keys))

    def _stop_waits(self) -> None:
        self.workspace.stop_waits()
        super()._stop_waits()

    def close(self) -> None:
        self.workspace.close()
        super().close()


def create(
    control: BaseCommunicator, *, transport: str = "p2p", fallback: BaseCommunicator | None = None
) -> BaseCommunicator:
    """The group `transport` (p2p or flashinfer) of `control`'s ranks. Raises P2PUnavailable on every rank alike.

    `fallback` serves what the kernels do not; without one, `control` does, where it moves CUDA tensors at all.
    """
    fallback = fallback or control
    if transport == "p2p":
        return P2PCommunicator.connect(fallback)
    if transport == "flashinfer":
        from shardwise.comm.p2p.flashinfer import FlashInferCommunicator

        return FlashInferCommunicator(fallback)
    raise ValueError(f"transport {transport!r} has no peer-to-peer kernels; legal: p2p, flashinfer")


def _require_dtype(tensor: Tensor, strategy: str, legal: Iterable[torch.dtype]) -> None:
    if tensor.dtype not in legal:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in legal)
        raise CommError(f"strategy {strategy} on transport p2p sums {names}, not {tensor.dtype}; use AUTO")
