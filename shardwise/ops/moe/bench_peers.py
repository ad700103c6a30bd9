"""OpenAI's triton_kernels on a layer with MXFP4 weights, for comparison; nothing else uses it.

Its interface is that of Triton 3.5's repository (python/triton_kernels), which wheels of sgl-kernel carry too. The
package of that name on PyPI is another one.
"""

from importlib.util import find_spec

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
