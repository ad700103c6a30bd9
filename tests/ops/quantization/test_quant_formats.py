"""Number formats bit by bit, and the packed layouts of quantised tensors."""

import pytest
import torch

from shardwise.ops.quantization import floats, fp8, int4, mxfp4, nvfp4

CODES = torch.arange(256, dtype=torch.uint8)


def same_bits(left, right):
    assert left.dtype == right.dtype == torch.float32
    assert torch.equal(left.isnan(), right.isnan())
    assert torch.equal(left.nan_to_num(0.0).view(torch.int32), right.nan_to_num(0.0).view(torch.int32))


def test_e2m1_values_are_those_of_the_specification():
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    wanted = torch.tensor(table + [-value for value in table])
    wanted[8] = -0.0
    same_bits(floats.e2m1_decode(CODES[:16]), wanted)
    assert torch.equal(floats.e2m1_encode(wanted), CODES[:16])


@pytest.mark.parametrize(
    "value,code",
    [(0.25, 0), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5.0, 6), (1e30, 7), (float("inf"), 7)],
)
def test_e2m1_ties_go_to_the_even_code_and_large_values_saturate(value, code):
    both = floats.e2m1_encode(torch.tensor([value, -value], dtype=torch.float64))
    assert both.tolist() == [code, code | 8]


def test_e2m1_rounds_to_the_nearest_code():
    values = torch.linspace(-7, 7, 2801, dtype=torch.float64)
    table = floats.e2m1_decode(CODES[:16], torch.float64)
    best = (values[:, None] - table[None, :]).abs().min(dim=1).values
    assert torch.equal((values - floats.e2m1_decode(floats.e2m1_encode(values), torch.float64)).abs(), best)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_e2m1_rounds_every_number_to_what_its_code_stands_for(dtype):
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    got, wanted = floats.e2m1_round(values), floats.e2m1_decode(floats.e2m1_encode(values), dtype)
    assert got.dtype == dtype and got[values.isnan()].eq(0).all()
    assert torch.equal(got[~values.isnan()].view(torch.int16), wanted[~values.isnan()].view(torch.int16))


def test_e2m1_pairs_hold_the_first_value_in_the_low_nibble():
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    assert floats.e2m1_pack(codes).tolist() == [[0x21, 0x0F]]
    assert torch.equal(floats.e2m1_unpack(floats.e2m1_pack(codes)), codes)
    with pytest.raises(ValueError, match="must be even"):
        floats.e2m1_pack(codes[:, :3])


def test_e8m0_agrees_with_torch_for_every_code_including_subnormal_and_nan():
    same_bits(floats.e8m0_decode(CODES), CODES.view(torch.float8_e8m0fnu).float())
    assert torch.equal(floats.e8m0_encode(floats.e8m0_decode(CODES)), CODES)


def test_e8m0_encodes_the_power_of_two_below():
    values = torch.tensor([0.0, 1.0, 1.999, 2.0, 3.9, float("inf"), 1e-45])
    assert floats.e8m0_encode(values).tolist() == [0, 127, 127, 128, 128, 255, 0]


def test_e4m3_saturates_and_keeps_nan():
    got = floats.e4m3_encode(torch.tensor([1e9, -500.0, float("nan"), 2.0**-9, 2.0**-11])).float()
    assert got[:2].tolist() == [448.0, -448.0] and got[2].isnan() and got[3:].tolist() == [2.0**-9, 0.0]


def test_mxfp4_returns_values_that_it_can_hold():
    blocks = torch.randint(0, 256, (3, 5, 2, 16), dtype=torch.uint8)
    blocks[..., 0] = 0x77  # the largest code in each block: scales come back as they were
    scales = torch.randint(100, 150, (3, 5, 2), dtype=torch.uint8)
    values = mxfp4.dequantize_mxfp4(blocks, scales, torch.float64)
    again, scales_again = mxfp4.quantize_mxfp4(values)
    assert torch.equal(scales_again, scales) and torch.equal(again, blocks)


def test_mxfp4_scale_is_the_exponent_of_the_largest_value_less_two():
    values = torch.zeros(1, 64)
    values[0, 3], values[0, 40] = 7.9, -0.3
    blocks, scales = mxfp4.quantize_mxfp4(values)
    assert scales.tolist() == [[127, 123]]
    got = mxfp4.dequantize_mxfp4(blocks, scales, torch.float32)
    assert got[0, 3] == 6.0 and got[0, 40] == -0.25


def test_mxfp4_blocks_with_nan_or_infinity_become_nan():
    values = torch.ones(1, 96)
    values[0, 0], values[0, 33] = float("nan"), float("inf")
    blocks, scales = mxfp4.quantize_mxfp4(values)
    assert scales.tolist() == [[255, 255, 125]]
    assert mxfp4.dequantize_mxfp4(blocks, scales).isnan().sum() == 64


def test_mxfp4_bfloat16_is_exact():
    blocks, scales = mxfp4.quantize_mxfp4(torch.randn(4, 64))
    exact = mxfp4.dequantize_mxfp4(blocks, scales, torch.float64)
    assert torch.equal(mxfp4.dequantize_mxfp4(blocks, scales).double(), exact)


@pytest.mark.parametrize(
    "blocks,scales,error,text",
    [
        (torch.zeros(2, 3, 16), torch.zeros(2, 3, dtype=torch.uint8), TypeError, "must be uint8"),
        (torch.zeros(2, 3, 8, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.uint8), ValueError, "need"),
        (torch.zeros(2, 3, 16, dtype=torch.uint8), torch.zeros(2, 4, dtype=torch.uint8), ValueError, "belong"),
    ],
)
def test_mxfp4_names_parts_that_do_not_belong_together(blocks, scales, error, text):
    with pytest.raises(error, match=text):
        mxfp4.dequantize_mxfp4(blocks, scales)


@pytest.mark.parametrize("rows,blocks", [(1, 1), (128, 4), (130, 5), (300, 9)])
def test_nvfp4_scale_swizzle_follows_its_formula_and_inverts(rows, blocks):
    scales = torch.randint(0, 120, (rows, blocks), dtype=torch.uint8)
    swizzled = nvfp4.swizzle_scales(scales)
    columns = -(-blocks // 4)
    for row, block in ((0, 0), (rows - 1, blocks - 1), (rows // 2, blocks // 2)):
        tile = row // 128 * columns + block // 4
        assert swizzled[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4] == scales[row, block]
    assert torch.equal(nvfp4.unswizzle_scales(swizzled, rows, blocks).view(torch.uint8), scales)
    with pytest.raises(ValueError, match="rows padded to 128"):
        nvfp4.unswizzle_scales(swizzled[:-1], rows, blocks)


def test_nvfp4_error_is_that_of_its_step_and_zero_blocks_stay_zero():
    values = torch.randn(8, 64)
    values[3] = 0
    g = nvfp4.nvfp4_global_scale(values)
    got = nvfp4.dequantize_nvfp4(*nvfp4.quantize_nvfp4(values, g), g)
    amax = values.unflatten(-1, (-1, 16)).abs().amax(-1).repeat_interleave(16, -1)
    assert (got - values).abs().le(amax / 5).all()  # half of the widest step (2 of 6), and the scale's rounding
    assert torch.equal(got[3], torch.zeros(64))
    assert nvfp4.nvfp4_global_scale(torch.zeros(4)) == 1


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e4])
def test_nvfp4_rounds_to_what_its_codes_and_scales_stand_for(scale):
    values = torch.randn(8, 64) * torch.logspace(-6, 0, 8)[:, None] * scale
    values[3], values[5, 7] = -0.0, float("nan")
    g = nvfp4.nvfp4_global_scale(values.nan_to_num(0.0))
    same_bits(nvfp4.round_nvfp4(values, g), nvfp4.dequantize_nvfp4(*nvfp4.quantize_nvfp4(values, g)))


def test_fp8_by_tensor_keeps_its_largest_value_and_a_tensor_of_zeros():
    values = torch.randn(40, 70)
    codes, scale = fp8.quantize_fp8(values)
    got = fp8.dequantize_fp8(codes, scale, torch.float32)
    assert (got - values).abs().le(values.abs() / 16 + scale * 2**-9).all()
    torch.testing.assert_close(got.abs().amax(), values.abs().amax())
    assert fp8.dequantize_fp8(*fp8.quantize_fp8(torch.zeros(3))).tolist() == [0, 0, 0]


def test_fp8_blocks_have_a_scale_each_and_ragged_edges():
    values = torch.randn(130, 200)
    values[:128, :128] *= 100
    codes, scales = fp8.quantize_fp8_blocks(values)
    assert codes.shape == (130, 200) and scales.shape == (2, 2)
    got = fp8.dequantize_fp8_blocks(codes, scales, dtype=torch.float32)
    assert (got - values).abs().le(values.abs() / 16 + 1e-3).all()
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        fp8.dequantize_fp8_blocks(codes, scales[:1])


def test_int4_layouts_return_values_that_they_can_hold():
    scales = torch.rand(6, 2) + 0.5
    weight = torch.randint(-7, 8, (6, 256)) * scales.repeat_interleave(128, 1)
    weight[:, ::128] = 7 * scales
    packed, found = int4.quantize_int4_awq(weight)
    assert packed.shape == (3, 256) and packed.dtype == torch.uint8
    torch.testing.assert_close(found, scales)
    torch.testing.assert_close(int4.dequantize_int4_awq(packed, found), weight)


def test_gptq_zero_points_are_used_as_stored():
    codes = torch.arange(16).repeat(4)[:, None].expand(64, 8)
    qweight = torch.zeros(8, 8, dtype=torch.int64)
    for row in range(64):
        qweight[row // 8] |= codes[row] << (4 * (row % 8))
    qweight = torch.where(qweight >= 2**31, qweight - 2**32, qweight).int()
    zeros = torch.full((2, 1), 0x33333333, dtype=torch.int32)
    got = int4.dequantize_int4_gptq(qweight, torch.ones(2, 8), zeros)
    assert torch.equal(got, (codes - 3).float())
    with pytest.raises(ValueError, match="qzeros"):
        int4.dequantize_int4_gptq(qweight, torch.ones(2, 8), zeros[:1])


def test_int4_error_is_at_most_half_a_step():
    weight = torch.randn(64, 16)
    qweight, scales, zeros = int4.quantize_int4_gptq(weight, 32)
    steps = scales.repeat_interleave(32, 0)
    assert (int4.dequantize_int4_gptq(qweight, scales, zeros) - weight).abs().le(steps * 1.01).all()
    packed, scales = int4.quantize_int4_awq(weight.T.repeat(1, 2).contiguous())
    error = (int4.dequantize_int4_awq(packed, scales) - weight.T.repeat(1, 2)).abs()
    assert error.le(scales.repeat_interleave(128, 1) * 0.501).all()


@pytest.mark.parametrize("make", [mxfp4.quantize_mxfp4, lambda x: nvfp4.quantize_nvfp4(x, torch.ones(()))])
def test_block_formats_refuse_partial_blocks(make):
    with pytest.raises(ValueError, match="not a multiple of the block"):
        make(torch.zeros(2, 40))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_int8_codes_of_half_precision_are_those_of_float32(shape):
    x, scale = torch.randn(4096).bfloat16(), torch.full(shape, 0.03)
    want = torch.ops.auto_deploy.torch_quant_fn(x.float(), scale).bfloat16()
    assert torch.equal(torch.ops.auto_deploy.torch_quant_fn(x, scale), want)


@pytest.mark.parametrize("shape", [(8,), (3, 1), (1, 8)])
def test_int8_codes_take_a_scale_of_every_channel(shape):
    x, scale = torch.randn(3, 8), torch.rand(shape) / 100 + 0.01
    got, scales = torch.ops.auto_deploy.torch_quant_fn(x, scale), scale.expand(3, 8)
    for row in range(3):
        for column in range(8):
            alone = torch.ops.auto_deploy.torch_quant_fn(x[row, column], scales[row, column])
            assert torch.equal(got[row, column], alone)
