"""Other projects' mixtures of experts, for comparison; nothing else uses this.

OpenAI's triton_kernels with MXFP4 weights: the interface is that of Triton 3.5's repository (python/triton_kernels),
which wheels of sgl-kernel carry too. The package of that name on PyPI is another one.
FlashInfer's cutlass_fused_moe with bf16 and e4m3 weights, as of FlashInfer 0.6.
"""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

Raw = tuple[Tensor, Tensor, Tensor]
"""Blocks uint8 [E, N, K/32, 16], scales uint8 [E, N, K/32] and bias [E, N], as checkpoints store them."""


def triton_kernels_found() -> bool:
    """Whether the modules that `TritonKernels` calls are installed."""
    try:
        return all(find_spec(f"triton_kernels.{name}") for name in ("matmul_ogs", "routing", "swiglu"))
    except ModuleNotFoundError:
        return False


class TritonKernels:
    """`peer(x, router, bias)`: the same mixture, routing included, by their own choice of shapes.

    Logits come from a bf16 product, ours are float32: near ties may choose other experts.
    """

    def __init__(self, up: Raw, down: Raw, top_k: int, alpha: float, limit: float):
        from triton_kernels.matmul_ogs import FnSpecs, FusedActivation
        from triton_kernels.swiglu import swiglu_fn

        (self._up, self._up_config), (self._down, self._down_config) = _laid_out(*up[:2]), _laid_out(*down[:2])
        self._biases = up[2], down[2]
        self._top_k = top_k
        self._act = FusedActivation(FnSpecs("swiglu", swiglu_fn, ("alpha", "limit")), (alpha, limit), 2)

    def __call__(self, x: Tensor, router: Tensor, bias: Tensor) -> Tensor:
        from triton_kernels.matmul_ogs import matmul_ogs
        from triton_kernels.routing import routing

        data, gather, scatter = routing(F.linear(x, router, bias.to(x.dtype)), self._top_k)
        inner = matmul_ogs(
            x, self._up, self._biases[0], data, gather_indx=gather, precision_config=self._up_config,
            fused_activation=self._act,
        )  # fmt: skip
        return matmul_ogs(
            inner, self._down, self._biases[1], data, scatter_indx=scatter, precision_config=self._down_config,
            gammas=data.gate_scal,
        )  # fmt: skip


def _laid_out(blocks: Tensor, scales: Tensor):
    """Weights in their layout for this device, and the configuration that carries their scales."""
    from triton_kernels.matmul_ogs import FlexCtx, PrecisionConfig
    from triton_kernels.numerics import InFlexData
    from triton_kernels.tensor import FP4, convert_layout, wrap_torch_tensor
    from triton_kernels.tensor_details import layout

    kind, options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
    codes = convert_layout(wrap_torch_tensor(blocks.flatten(2).mT, dtype=FP4), kind, **options)
    kind, options = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=8)
    factors = convert_layout(wrap_torch_tensor(scales.mT.contiguous()), kind, **options)
    return codes, PrecisionConfig(weight_scale=factors, flex_ctx=FlexCtx(rhs_data=InFlexData()))


class CutlassMixture:
    """`peer(x, ids, weights)`: FlashInfer's operator with the pair of kernel shapes that is best at the token count.

    All shapes are timed in the whole operator, first those of the one product, then of the other. FlashInfer's own
    tuning times products by themselves: with 1024 tokens and more it picked pairs that took 1.1 to 1.6 times as long as
    the best (H200). Without tuning it takes its first shapes, 3 to 6 times as long.
    """

    def __init__(self, first: Tensor, second: Tensor):  # [E, 2I, H], [E, H, I]
        one, ones = torch.ones((), device=first.device), torch.ones(first.shape[0], device=first.device)
        self._codes = first.dtype == torch.float8_e4m3fn
        self._weights, self._scales = (first, second), [ones, one, ones, one] if self._codes else []
        self._shapes: dict[int, list[int]] = {}  # of both products by token count
        self._asked: list[int] = [-1, -1]
        self._legal: list[list[int]] = [[], []]

    def _choose(self, _name, runners, _config, inputs, gemm_idx):
        """What FlashInfer asks its tuner for: a runner and the shape for product 1 or 2."""
        self._legal[gemm_idx - 1] = runners[0].get_valid_tactics(inputs, None)
        return runners[0], self._asked[gemm_idx - 1]

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        count = x.shape[0]
        if count not in self._shapes:
            self._shapes[count] = self._search(x, ids, weights)
        return self._run(self._shapes[count], x, ids, weights)

    def _run(self, shapes, x, ids, weights):
        from flashinfer.autotuner import AutoTuner
        from flashinfer.fused_moe import cutlass_fused_moe

        self._asked, AutoTuner.get().choose_one = shapes, self._choose
        x_in = x.to(self._weights[0].dtype)
        return cutlass_fused_moe(x_in, ids, weights, *self._weights, x.dtype, quant_scales=self._scales)

    def _search(self, *call):
        shapes = [[-1, -1], *self._shapes.values()][-1]  # those of the size before are near
        self._run(shapes, *call)
        for product, legal in enumerate(self._legal):
            best = float("inf")
            for shape in legal:
                tried = [*shapes[:product], shape, *shapes[product + 1 :]]
                time = self._milliseconds(tried, call, best)
                if time < best:
                    best, shapes = time, tried
        return shapes

    def _milliseconds(self, shapes, call, best: float) -> float:
        """Least of five runs, or the first where it is far from the best; infinite for shapes that do not apply."""
        times: list[float] = []
        while len(times) < 5 and min(times, default=0.0) < 1.2 * best:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(1_000_000)  # cycles in which the host gets ahead
            begin.record()
            try:
                self._run(shapes, *call)
            except RuntimeError:
                return float("inf")
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return min(times)
