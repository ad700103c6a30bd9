"""What our all-reduces and gathers on GPUs are timed beside, in the same ranks: NCCL, symmetric memory, FlashInfer.

A peer is made for one set of inputs and may be impossible there (no package, another dtype, too large): `make` raises,
or returns None for a size that is not for it. NCCL averages where it is timed, so that its data stays finite.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.comm import symmetric, window

EPS = 1e-5
MIB = 1 << 20
FLASHINFER_TOKENS, FLASHINFER_HIDDEN = 2048, 8192
"""Of its workspace: larger calls are not timed."""


@dataclass(frozen=True)
class Peer:
    """`call(i)` is the i-th of many; `result()` computes that of the first inputs once, anew: the sum (plus the
    residual), or what is gathered."""

    call: Callable[[int], Any]
    result: Callable[[], Tensor]


Makers = dict[str, Callable[[], Peer | None]]


class Peers:
    """Makers of peers on the ranks of an NCCL process group."""

    def __init__(self, nccl: dist.ProcessGroup):
        self.nccl, self.rank, self.world = nccl, dist.get_rank(nccl), nccl.size()
        self._flashinfer: tuple[Any, Tensor] | None = None
        self._stage: window.Window | None = None

    def plain(self, inputs: Sequence[Tensor]) -> Makers:
        """For flat tensors of one length."""
        return {
            "nccl": lambda: self._nccl(inputs),
            "nccl window": lambda: self._window(inputs[0]),
            "symm_mem one-shot": lambda: self._symmetric(inputs[0], "one_shot_all_reduce", MIB),
            "symm_mem two-shot": lambda: self._symmetric(inputs[0], "two_shot_all_reduce_", 64 * MIB),
        }

    def fused(self, inputs: Sequence[tuple[Tensor, Tensor]], weight: Tensor) -> Makers:
        """For pairs (partial sums, residual) [T, H] and weight [H]."""
        return {
            "nccl + norm": lambda: self._nccl_norm(inputs, weight),
            "flashinfer one-shot": lambda: self._flashinfer_fused(inputs, weight, True),
            "flashinfer two-shot": lambda: self._flashinfer_fused(inputs, weight, False),
        }

    def gathered(self, x: Tensor) -> Makers:
        """For a flat tensor, of one length on all ranks."""
        return {"nccl": lambda: self._nccl_gather(x)}

    def _nccl_gather(self, x: Tensor) -> Peer:
        everyone = x.new_empty(self.world * x.numel())

        def gather() -> Tensor:
            dist.all_gather_into_tensor(everyone, x, group=self.nccl)
            return everyone

        return Peer(lambda i: gather(), gather)

    def _nccl(self, inputs: Sequence[Tensor]) -> Peer:
        work = [x.clone() for x in inputs]

        def total() -> Tensor:
            result = inputs[0].clone()
            dist.all_reduce(result, group=self.nccl)
            return result

        return Peer(lambda i: dist.all_reduce(work[i % len(work)], op=dist.ReduceOp.AVG, group=self.nccl), total)

    def _window(self, x: Tensor) -> Peer | None:
        """NCCL on memory of its window, in place on zeros: its symmetric kernels have no AVG."""
        if x.nbytes > window.BUFFER_BYTES:
            return None
        reason = window.obstacle(self.world, capturing=False)
        if reason:
            raise RuntimeError(reason)
        window.require_dtype(x.dtype)
        if self._stage is None:
            self._stage = window.Window(self.nccl, x.device, self._tell)
        staged = self._stage.buffer.view(x.dtype)[: x.numel()]

        def total() -> Tensor:
            staged.copy_(x)
            dist.all_reduce(staged, group=self.nccl)
            result = staged.clone()
            staged.zero_()
            return result

        staged.zero_()
        return Peer(lambda i: dist.all_reduce(staged, group=self.nccl), total)

    def _tell(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.nccl)
        return values

    def _symmetric(self, x: Tensor, operator: str, limit: int) -> Peer | None:
        if x.nbytes > limit:
            return None
        reason = symmetric.obstacle(self.world, capturing=False)
        if reason:
            raise RuntimeError(reason)
        symmetric.require_dtype(x.dtype)
        buffer = symmetric.shared_buffer(x.nbytes, self.nccl, x.device).view(x.dtype)[: x.numel()]
        function = getattr(torch.ops.symm_mem, operator)
        name = self.nccl.group_name

        def total() -> Tensor:
            buffer.copy_(x)
            return function(buffer, "sum", name).clone()

        return Peer(lambda i: function(buffer, "sum", name), total)

    def _nccl_norm(self, inputs: Sequence[tuple[Tensor, Tensor]], weight: Tensor) -> Peer:
        from flashinfer.norm import fused_add_rmsnorm

        work = [(x.clone(), residual.clone()) for x, residual in inputs]

        def call(i: int) -> None:
            x, residual = work[i % len(work)]
            dist.all_reduce(x, op=dist.ReduceOp.AVG, group=self.nccl)
            fused_add_rmsnorm(x, residual, weight, EPS)

        def total() -> Tensor:
            x, residual = (tensor.clone() for tensor in inputs[0])
            dist.all_reduce(x, group=self.nccl)
            fused_add_rmsnorm(x, residual, weight, EPS)
            return residual

        return Peer(call, total)

    def _flashinfer_fused(self, inputs: Sequence[tuple[Tensor, Tensor]], weight: Tensor, one_shot: bool) -> Peer | None:
        tokens, hidden = inputs[0][0].shape
        too_large = tokens * hidden > FLASHINFER_TOKENS * FLASHINFER_HIDDEN
        if too_large or (not one_shot and tokens <= 16):  # two-shot needs more tokens than ranks, and pays much later
            return None
        if inputs[0][0].dtype not in (torch.bfloat16, torch.float16):
            raise RuntimeError(f"its workspace is for 16-bit floats, not {inputs[0][0].dtype}")
        library, workspace = self._library()
        out, total = torch.empty_like(inputs[0][0]), torch.empty_like(inputs[0][0])

        def call(i: int) -> None:
            x, residual = inputs[i % len(inputs)]
            library.trtllm_allreduce_fusion(
                allreduce_in=x, world_size=self.world, world_rank=self.rank, token_num=tokens, hidden_dim=hidden,
                workspace_ptrs=workspace, launch_with_pdl=True, trigger_completion_at_end=True, fp32_acc=True,
                pattern_code=library.AllReduceFusionPattern.kARResidualRMSNorm, use_oneshot=one_shot,
                allreduce_out=None, residual_in=residual, residual_out=total, norm_out=out, quant_out=None,
                scale_out=None, rms_gamma=weight, rms_eps=EPS, scale_factor=None, layout_code=None,
            )  # fmt: skip

        def first_total() -> Tensor:
            call(0)
            return total.clone()

        return Peer(call, first_total)

    def _library(self) -> tuple[Any, Tensor]:
        """FlashInfer's module and its workspace of plain CUDA IPC memory (never another: those touch multicast)."""
        if self._flashinfer is None:
            logging.getLogger("flashinfer").setLevel(logging.ERROR)
            from flashinfer.comm import trtllm_ar as library

            library.get_trtllm_comm_module()
            _, workspace = library.trtllm_create_ipc_workspace_for_all_reduce_fusion(
                self.rank, self.world, FLASHINFER_TOKENS, FLASHINFER_HIDDEN, group=self.nccl, use_symm_dev_mem=False
            )
            self._flashinfer = library, workspace
        return self._flashinfer


def made(maker: Callable[[], Peer | None], gather: Callable[[Any], list]) -> tuple[Peer | None, str]:
    """(the peer, or None where some rank cannot make it, the first reason), alike on all ranks."""
    peer, reason = None, ""
    try:
        peer = maker()
        if peer is not None:
            peer.call(0)
            torch.cuda.synchronize()
    except Exception as error:  # a peer that is missing or fails must not end the run
        peer, reason = None, f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
    answers = gather((peer is not None, reason))
    if all(runs for runs, _ in answers):
        return peer, ""
    return None, next((text for _, text in answers if text), "")
