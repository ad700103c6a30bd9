"""Random weights in the forms that quantisers write, packed bit by bit from the formats' definitions.

Each form gives {suffix of the module's name: tensor} and the weight [out, in] in float32 that is meant.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
"""Numbers of a word's codes from the lowest bits on."""
Stored = tuple[dict[str, torch.Tensor], torch.Tensor]


def words(codes: np.ndarray, bits: int, axis: int, order=None) -> torch.Tensor:
    """int32 words of neighbours along an axis, whose last word may be short."""
    count = 32 // bits
    codes = np.moveaxis(codes, axis, -1).astype(np.uint64)
    packed = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] // count)), np.uint64)
    for word in range(packed.shape[-1]):
        for place, number in enumerate(order or range(count)):
            if word * count + number < codes.shape[-1]:
                packed[..., word] |= codes[..., word * count + number] << np.uint64(bits * place)
    return torch.from_numpy(np.moveaxis(packed, -1, axis).astype(np.uint32).view(np.int32).copy())


@dataclass
class Form:
    """One format. `section`: the quantization_config that says so."""

    section: dict[str, Any] = field(default_factory=dict)
    group: int = 16
    bits: int = 4

    def store(self, rng: np.random.Generator, out: int, inner: int) -> Stored:
        raise NotImplementedError

    def scales(self, rng, *shape: int) -> np.ndarray:
        return rng.uniform(0.6, 1.2, shape) * 0.5 / 2**self.bits

    def codes(self, rng, *shape: int) -> np.ndarray:
        return rng.integers(0, 2**self.bits, shape)


def halves(values: np.ndarray, dtype=torch.float16) -> tuple[torch.Tensor, np.ndarray]:
    """As they are stored, and what then stands there."""
    stored = torch.from_numpy(np.asarray(values, np.float32)).to(dtype)
    return stored, stored.float().numpy()


@dataclass
class AwqForm(Form):
    def store(self, rng, out, inner):
        codes, zeros = self.codes(rng, inner, out), self.codes(rng, inner // self.group, out)
        scales, exact = halves(self.scales(rng, *zeros.shape))
        group = np.arange(inner) // self.group
        stored = {".qweight": words(codes, 4, 1, AWQ), ".qzeros": words(zeros, 4, 1, AWQ), ".scales": scales}
        return stored, meant(((codes - zeros[group]) * exact[group]).T)


@dataclass
class GptqForm(Form):
    act_order: bool = False
    first: bool = True
    """Zero points are stored less one."""
    symmetric: bool = False

    def store(self, rng, out, inner):
        group = self.group if self.group > 0 else inner
        index = np.arange(inner) // group
        if self.act_order:
            rng.shuffle(index)
        codes, zeros = self.codes(rng, inner, out), self.codes(rng, inner // group, out)
        if self.symmetric:
            zeros[:] = 2 ** (self.bits - 1)
        scales, exact = halves(self.scales(rng, *zeros.shape))
        written = (zeros - self.first) % 2**self.bits
        stored = {
            ".qweight": words(codes, self.bits, 0),
            ".qzeros": words(written, self.bits, 1),
            ".scales": scales,
            ".g_idx": torch.from_numpy(index.astype(np.int32)),
        }
        return stored, meant(((codes - zeros[index]) * exact[index]).T)


@dataclass
class PackedIntForm(Form):
    """compressed-tensors: signed codes, stored with an offset of half their range; group 0: one scale a row."""

    symmetric: bool = True
    act_order: bool = False

    def store(self, rng, out, inner):
        group, half = self.group or inner, 2 ** (self.bits - 1)
        index = np.arange(inner) // group
        if self.act_order:
            rng.shuffle(index)
        codes, zeros = self.codes(rng, out, inner) - half, self.codes(rng, out, inner // group) - half
        scales, exact = halves(self.scales(rng, *zeros.shape), torch.bfloat16)
        stored = {
            ".weight_packed": words(codes + half, self.bits, 1),
            ".weight_scale": scales,
            ".weight_shape": torch.tensor([out, inner]),
        }
        if self.symmetric:
            zeros[:] = 0
        else:
            stored[".weight_zero_point"] = words(zeros + half, self.bits, 0)
        if self.act_order:
            stored[".weight_g_idx"] = torch.from_numpy(index.astype(np.int32))
        return stored, meant((codes - zeros[:, index]) * exact[:, index])


@dataclass
class ByteForm(Form):
    """int8 or float8, one scale a row or a tensor."""

    bits: int = 8
    dtype: torch.dtype = torch.int8
    channel: bool = True
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.bfloat16

    def store(self, rng, out, inner):
        shape = (out, 1) if self.channel else (1,)
        if self.dtype == torch.int8:
            codes = torch.from_numpy(self.codes(rng, out, inner) - 128).to(torch.int8)
            scales, exact = halves(self.scales(rng, *shape), self.scale_dtype)
        else:
            codes = torch.from_numpy(rng.uniform(-2, 2, (out, inner))).to(self.dtype)
            scales, exact = halves(rng.uniform(0.1, 0.4, shape), self.scale_dtype)
        stored, values = {".weight": codes, ".weight_scale": scales}, codes.float().numpy()
        if not self.symmetric:
            zeros = rng.integers(-40, 40, shape)
            stored[".weight_zero_point"] = torch.from_numpy(zeros).to(torch.int8)
            values = values - zeros
        return stored, meant(values * exact)


@dataclass
class Float4Form(Form):
    """Pairs of e2m1 in a byte, the first in its lower half; e4m3 or power-of-two scales, and one scale of the tensor,
    by which compressed-tensors divides (`divides`) and ModelOpt multiplies."""

    divides: bool | None = None
    names: tuple[str, str] = (".weight", ".weight_scale_2")
    inputs: str = ".input_scale"

    def store(self, rng, out, inner):
        codes = self.codes(rng, out, inner)
        stored = {self.names[0]: torch.from_numpy((codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8))}
        shape = (out, inner // self.group)
        if self.divides is None:
            powers = rng.integers(122, 126, shape)
            stored[".weight_scale"], scales = torch.from_numpy(powers.astype(np.uint8)), 2.0 ** (powers - 127.0)
        else:
            stored[".weight_scale"], scales = halves(rng.uniform(40, 440, shape), torch.float8_e4m3fn)
            factor = np.float32(rng.uniform(2e-4, 6e-4))
            one = torch.tensor([1 / factor]) if self.divides else torch.tensor(factor)
            stored[self.names[1]], stored[self.inputs] = one, torch.ones_like(one)
            scales = scales / one.numpy() if self.divides else scales * one.numpy()
        return stored, meant(E2M1[codes] * np.repeat(scales, self.group, 1))


@dataclass
class Mxfp8Form(Form):
    def store(self, rng, out, inner):
        codes = torch.from_numpy(rng.uniform(-3, 3, (out, inner))).to(torch.float8_e4m3fn)
        powers = rng.integers(122, 126, (out, inner // 32))
        stored = {".weight": codes, ".weight_scale": torch.from_numpy(powers.astype(np.uint8))}
        return stored, meant(codes.float().numpy() * np.repeat(2.0 ** (powers - 127.0), 32, 1))


def meant(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))


def gptq(bits: int = 4, group: int = 16, **options) -> dict:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, **options}


def compressed(form: str, **weights) -> dict:
    groups = {"all": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", **weights}}}
    return {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"], "config_groups": groups}


def packed(**weights) -> dict:
    return compressed("pack-quantized", **{"group_size": 16, **weights})


def whole_bytes(kind: str, form: str, **weights) -> dict:
    return compressed(form, **{"num_bits": 8, "type": kind, "strategy": "channel", **weights})


def modelopt(algorithm: str) -> dict:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]}


_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
_NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
_BESIDE = dict(names=(".weight_packed", ".weight_global_scale"), inputs=".input_global_scale")
FORMS: dict[str, Form] = {
    "awq": AwqForm(_AWQ),
    "gptq": GptqForm(gptq()),
    "gptq 8 bit, symmetric": GptqForm(gptq(8), bits=8, symmetric=True),
    "gptq act-order": GptqForm(gptq(desc_act=True), act_order=True),
    "gptq v2, one group": GptqForm(gptq(group=-1, checkpoint_format="gptq_v2"), group=-1, first=False),
    "int4": PackedIntForm(packed()),
    "int4 with zeros": PackedIntForm(packed(symmetric=False), symmetric=False),
    "int4 act-order": PackedIntForm(packed(actorder="group", symmetric=False), symmetric=False, act_order=True),
    "int8 packed, a row": PackedIntForm(packed(num_bits=8, strategy="channel", group_size=None), group=0, bits=8),
    "int8": ByteForm(whole_bytes("int", "int-quantized")),
    "int8 with zeros": ByteForm(whole_bytes("int", "int-quantized", symmetric=False), symmetric=False),
    "fp8 a row": ByteForm(whole_bytes("float", "float-quantized"), dtype=torch.float8_e4m3fn),
    "fp8 a tensor": ByteForm(
        whole_bytes("float", "float-quantized", strategy="tensor"), dtype=torch.float8_e4m3fn, channel=False
    ),
    "nvfp4": Float4Form(modelopt("NVFP4"), divides=False),
    "nvfp4 compressed": Float4Form(compressed("nvfp4-pack-quantized", **_NVFP4), divides=True, **_BESIDE),
    "mxfp4": Float4Form(compressed("mxfp4-pack-quantized", **_NVFP4 | {"group_size": 32}), group=32, **_BESIDE),
    "mxfp8": Mxfp8Form(modelopt("MXFP8"), group=32),
}
