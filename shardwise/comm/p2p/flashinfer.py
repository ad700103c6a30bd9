"""Transport `flashinfer`: the same meaning on TRT-LLM's all-reduce kernels, as FlashInfer ships them.

The workspace is plain CUDA IPC memory, from `trtllm_create_ipc_workspace_for_all_reduce_fusion` with
`use_symm_dev_mem=False` and from nothing else: FlashInfer's other workspaces touch multicast objects. Its exchange
of handles uses torch.distributed, so MPI mode has only `p2p`. The kernels have no deadline and no abort: a rank that
never comes leaves the others spinning until torch's watchdog or the supervisor ends the job.
"""

import importlib.util

import torch
from torch import Tensor

from shardwise.comm.collective import BaseCommunicator
from shardwise.comm.p2p.delegate import Delegating
from shardwise.comm.p2p.workspace import P2PUnavailable

WORLDS = (2, 4, 8, 16)
HALVES = (torch.bfloat16, torch.float16)
KERNELS = ("AUTO", "MIN_LATENCY", "ONESHOT", "TWOSHOT")
_ALIGNMENT = 16
_RESULTS, _INPUTS = ("allreduce_out", "residual_out", "norm_out"), ("residual_in", "rms_gamma")
"""Tensors beside the one that is summed, as the library calls them; a call has some of them."""
_VECTOR = 8
"""Elements of a 16-byte access; the hidden size must be a multiple."""
_LEAST_HIDDEN = 32 * _VECTOR
"""A token has a thread for each vector; their sum is taken by whole warps."""
_FLAT_HIDDEN = 1024
"""Hidden size that a flat tensor is given; other lengths go to `fallback`."""
ONE_SHOT_BYTES = 8 << 20
"""Above it a group of more than two takes the two-shot kernel when AUTO chooses."""


class FlashInferCommunicator(Delegating):
    """One rank's end of a group on one host, demo mode only."""

    def __init__(self, fallback: BaseCommunicator, *, max_tokens: int = 2048, max_hidden: int = 8192):
        """Every rank of `fallback` (transport nccl) calls it. A call may have max_tokens * max_hidden elements.

        Larger calls, float32, and shapes that the kernels do not take go to `fallback`.
        """
        super().__init__(fallback, "flashinfer")
        self.max_elements = max_tokens * max_hidden
        reasons = fallback.all_gather_object(self._obstacle())
        if any(reasons):
            failed = [f"rank {self.ranks[r]}: {text}" for r, text in enumerate(reasons) if text]
            raise P2PUnavailable("FlashInfer's all-reduce is not available: " + "; ".join(failed))
        self._handles, self._workspace = self._library.trtllm_create_ipc_workspace_for_all_reduce_fusion(
            self.rank,
            self.size,
            max_tokens,
            max_hidden,
            group=fallback.group,  # type: ignore[attr-defined]
            use_symm_dev_mem=False,
        )
        self.reason = "FlashInfer's TRT-LLM kernels over CUDA IPC"

    def _obstacle(self) -> str | None:
        if importlib.util.find_spec("flashinfer") is None:
            return "the package flashinfer-python is not installed"
        if self.fallback.transport != "nccl":
            return "its workspace is exchanged over torch.distributed, this group has none; use transport p2p"
        if self.size not in WORLDS:
            return f"groups of {', '.join(map(str, WORLDS))} ranks, not {self.size}"
        try:
            from flashinfer.comm import trtllm_ar

            trtllm_ar.get_trtllm_comm_module()  # compiles at the first use of a machine, about two minutes
        except Exception as error:  # whatever stops one rank must reach all, or they wait for it
            return f"its kernels cannot be loaded: {type(error).__name__}: {str(error)[:300]}"
        self._library = trtllm_ar
        return None

    def _fused(self, tensor, residual, weight, weight_bias, strategy, out, residual_out):
        hidden = tensor.shape[-1]
        results = [result for result in (out, residual_out) if result is not None]
        takes_hidden = hidden % _VECTOR == 0 and hidden >= _LEAST_HIDDEN
        fits = takes_hidden and self._fits(tensor, residual, weight, *results)
        if strategy not in KERNELS or weight_bias or not fits:
            return None
        pattern = self._library.AllReduceFusionPattern.kARResidualRMSNorm

        def kernel(x, residual, weight, eps, _, normed, total) -> None:
            norm = {"norm_out": normed, "rms_gamma": weight}
            self._run(x, hidden, strategy, pattern, eps, residual_in=residual, residual_out=total, **norm)

        return kernel

    def _fits(self, tensor: Tensor, *others: Tensor) -> bool:
        """The same on all ranks: where tensors begin, which may differ between them, does not count."""
        same = all(each.dtype == tensor.dtype for each in others)
        return tensor.dtype in HALVES and 0 < tensor.numel() <= self.max_elements and same

    def _reduce(self, source: Tensor, target: Tensor, strategy: str) -> None:
        if strategy not in KERNELS or not self._fits(source, target) or source.numel() % _FLAT_HIDDEN:
            self.fallback._reduce(source, target, strategy)  # which has algorithms of these names too
            return
        pattern = self._library.AllReduceFusionPattern.kAllReduce
        self._run(source.view(-1), _FLAT_HIDDEN, strategy, pattern, allreduce_out=target.view(-1))

    def _run(
        self, x: Tensor, hidden: int, strategy: str, pattern: int, eps: float | None = None, **tensors: Tensor
    ) -> None:
        tokens = x.numel() // hidden
        one_shot = strategy in ("ONESHOT", "MIN_LATENCY") or (
            strategy == "AUTO" and (self.size == 2 or x.numel() * x.element_size() <= ONE_SHOT_BYTES)
        )
        placed = {name: _on_vectors(tensor) for name, tensor in tensors.items()}
        self._library.trtllm_allreduce_fusion(
            allreduce_in=_on_vectors(x),
            world_size=self.size,
            world_rank=self.rank,
            token_num=tokens,
            hidden_dim=hidden,
            workspace_ptrs=self._workspace,
            launch_with_pdl=True,
            trigger_completion_at_end=True,
            fp32_acc=True,
            pattern_code=pattern,
            use_oneshot=one_shot or tokens <= self.size,
            **{name: placed.get(name) for name in (*_RESULTS, *_INPUTS)},
            rms_eps=eps,
            quant_out=None,
            scale_out=None,
            scale_factor=None,
            layout_code=None,
        )
        for name in _RESULTS:
            if placed.get(name) is not tensors.get(name):
                tensors[name].copy_(placed[name])

    def _split(self, name: str, members: list[int], colors: list[int], keys: list[int]) -> BaseCommunicator:
        group = self._split_fallback(name, colors, keys)
        group.reason = "sub-groups of a flashinfer group use NCCL: its workspace serves the whole group"
        return group

    def close(self) -> None:
        if self._handles and self.broken is None:  # giving memory back is a collective: a broken group leaves it
            self._library.trtllm_destroy_ipc_workspace_for_all_reduce_fusion(
                self._handles,
                group=self.fallback.group,  # type: ignore[attr-defined]
            )
            self._handles = []
        super().close()


def _on_vectors(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it that begins where the kernels' accesses may."""
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()
