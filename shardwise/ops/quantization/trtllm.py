"""FP8 linear as TRT-LLM contracts it: one fused quantisation launch, then the matrix product that suits the size."""

from torch import Tensor

from shardwise.ops.devices import require_one_device
from shardwise.ops.quantization.reference import check_fp8_linear, linear_fake, scaled_mm
from shardwise.ops.quantization.triton_fp8 import MOST_FEW_ROWS, few_rows_linear, quantize
from shardwise.ops.recorded import recorded
from shardwise.ops.registry import TRITON, operator
from shardwise.ops.triton_support import interpreting


@operator(fake=linear_fake, needs=(TRITON,), instead="torch_quant_fp8_linear")
@recorded()
def trtllm_quant_fp8_linear(
    input: Tensor,
    weight_fp8: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """`torch_quant_fp8_linear` with the input quantised in one launch.

    input [..., K], weight_fp8 float8_e4m3fn [N, K], one-element scales, both required. Few rows go through a Triton
    kernel that streams the weights, more through the GPU library's FP8 product.
    """
    require_one_device("trtllm_quant_fp8_linear", input, weight_fp8, bias, input_scale, weight_scale)
    s_in, s_weight = check_fp8_linear("trtllm_quant_fp8_linear", input, weight_fp8, bias, input_scale, weight_scale)
    rows = input.reshape(-1, input.shape[-1]).contiguous()
    shape = (*input.shape[:-1], weight_fp8.shape[0])
    if 0 in shape:
        return input.new_empty(shape)
    if rows.shape[0] <= MOST_FEW_ROWS or interpreting():
        apart = None if bias is None else bias.contiguous()
        out = few_rows_linear(rows, weight_fp8.contiguous(), apart, s_in, s_weight)
        return out.view(shape)
    out = scaled_mm(quantize(rows, s_in), weight_fp8, s_in, s_weight, input.dtype)
    return (out if bias is None else (out + bias).to(input.dtype)).view(shape)
