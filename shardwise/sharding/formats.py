"""How a logical weight is stored: the tensors of each quantisation format, on the weight's own axes.

A format turns one linear weight, given by its output dims and its input dim, into stored tensors. Packed words, block
scales and zeros are the same dims at a coarser grain (`Dim.coarse`), so they are cut where the weight is cut.
"""

from dataclasses import dataclass, replace

from shardwise.sharding.axes import Dim, LogicalAxis, fixed
from shardwise.sharding.packing import AWQ_WORDS, PAIRS, PAIRS_IN_BLOCKS, Packing, in_words
from shardwise.sharding.tensors import TensorSpec

DTYPES = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float8_e4m3fn": "F8_E4M3",
}
"""Storage types by the names that configs use."""


def storage_type(name: str) -> str:
    """Storage type of a dtype as configs name it; ValueError lists the known ones."""
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not known; legal: {', '.join(DTYPES)}")
    return DTYPES[name]


@dataclass(frozen=True, slots=True)
class Linear:
    """A weight before it is stored: `lead` dims (the expert dim of stacked weights), then out x in."""

    role: str
    name: str
    """Module name, without `.weight`."""
    out: Dim
    inner: Dim
    dtype: str
    lead: tuple[Dim, ...] = ()
    experts: LogicalAxis | None = None
    transposed: bool = False
    """Stored as [in, out]."""
    suffix: str = ".weight"

    def tensor(
        self,
        part: str,
        suffix: str,
        out: Dim | None,
        inner: Dim | None,
        dtype: str,
        values: int = 0,
        optional: bool = False,
        packing: Packing | None = None,
    ) -> TensorSpec:
        """One stored tensor; a dim given as None is absent."""
        pair = (inner, out) if self.transposed else (out, inner)
        return TensorSpec(
            f"{self.role}.{part}",
            self.name + suffix,
            self.lead + tuple(d for d in pair if d is not None),
            dtype,
            values,
            optional=optional,
            experts=self.experts,
            packing=packing,
            transposed=self.transposed,
        )

    def weight(self, dtype: str) -> TensorSpec:
        return self.tensor("weight", self.suffix, self.out, self.inner, dtype, values=1)

    def companion(self, name: str) -> str:
        """Suffix of a tensor beside the weight: `.weight_scale`, or `_weight_scale` where weights have no suffix."""
        return f".{name}" if self.suffix else f"_{name}"

    def turned(self) -> "Linear":
        """The same weight, stored the other way round."""
        return replace(self, transposed=not self.transposed)


class Format:
    """Plain storage in the weight's own type; subclasses are the quantised formats."""

    name = "none"

    def store(self, linear: Linear) -> tuple[TensorSpec, ...]:
        return (linear.weight(linear.dtype),)


PLAIN = Format()
SCALAR = fixed(1)


@dataclass(frozen=True)
class Fp8(Format):
    """One byte a weight. Scales: `block` (a, b) tiles, or one a row (`channel`), or one a tensor."""

    block: tuple[int, int] | None = None
    channel: bool = False
    static_input: bool = False
    scale: str = "weight_scale"
    scale_dtype: str = "F32"
    one_element: bool = False
    """A scale of a tensor has shape [1] instead of []."""
    dtype: str = "F8_E4M3"
    input_scale: str = "input_scale"
    symmetric: bool = True
    """False: integers, with a zero point beside each scale."""
    name = "fp8"

    def store(self, linear: Linear) -> tuple[TensorSpec, ...]:
        weight = linear.weight(self.dtype)
        suffix = linear.companion(self.scale)
        single = SCALAR if self.one_element else None
        out: Dim | None
        inner: Dim | None
        if self.block:
            out, inner = linear.out.coarse(self.block[0]), linear.inner.coarse(self.block[1])
        elif self.channel:
            out, inner = linear.out, SCALAR
        else:
            out, inner = single, None
        parts = [weight, linear.tensor("scale", suffix, out, inner, self.scale_dtype)]
        if not self.symmetric:
            parts.append(linear.tensor("zeros", linear.companion("weight_zero_point"), out, inner, self.dtype))
        if self.static_input:
            name = linear.companion(self.input_scale)
            parts.append(linear.tensor("input_scale", name, single, None, "F32", optional=True))
        return tuple(parts)


@dataclass(frozen=True)
class Packed4(Format):
    """Two 4-bit floats a byte with one scale a `group` of inputs: NVFP4 (16, e4m3, global scale), MXFP4 (32, e8m0)."""

    group: int
    name: str
    weight: str = "weight"
    weight_dtype: str = "U8"
    scale: str = "weight_scale"
    scale_dtype: str = "F8_E4M3"
    global_scale: str = ""
    """A factor of the whole tensor."""
    global_divisor: str = ""
    """The same as its reciprocal."""
    input_scale: str = ""
    one_element: bool = False

    def store(self, linear: Linear) -> tuple[TensorSpec, ...]:
        inner = linear.inner
        suffix = linear.companion(self.weight)
        weight = linear.tensor("weight", suffix, linear.out, inner.coarse(2), self.weight_dtype, 2, packing=PAIRS)
        scale = linear.tensor(
            "scale", linear.companion(self.scale), linear.out, inner.coarse(self.group), self.scale_dtype
        )
        single = SCALAR if self.one_element else None
        more = [
            ("global_scale", self.global_scale),
            ("global_divisor", self.global_divisor),
            ("input_scale", self.input_scale),
        ]
        parts = [
            linear.tensor(role, linear.companion(name), single, None, "F32", optional=role == "input_scale")
            for role, name in more
            if name
        ]
        return (weight, scale, *parts)


@dataclass(frozen=True)
class Gptq(Format):
    """GPTQ: int32 words along the input, zeros and scales a group, `g_idx` a row.

    With act-order the groups of neighbouring input rows are arbitrary, so a row-parallel weight keeps all scales.
    """

    bits: int
    group: int
    act_order: bool
    zeros_less_one: bool = True
    """As the form named `gptq` stores zero points; `gptq_v2` stores them as they are."""
    name = "gptq"

    def store(self, linear: Linear) -> tuple[TensorSpec, ...]:
        pack = 32 // self.bits
        groups = linear.inner.coarse(self.group) if self.group > 0 else SCALAR
        if self.act_order and self.group > 0:
            groups = fixed(linear.inner.length).coarse(self.group)  # all of them: an input may be of any
        turned = linear.turned()
        rows, columns = in_words(self.bits, -2), in_words(self.bits, added=int(self.zeros_less_one))
        return (
            turned.tensor("weight", ".qweight", linear.out, linear.inner.coarse(pack), "I32", pack, packing=rows),
            turned.tensor("zeros", ".qzeros", linear.out.coarse(pack), groups, "I32", packing=columns),
            turned.tensor("scale", ".scales", linear.out, groups, "F16"),
            turned.tensor("group_index", ".g_idx", None, linear.inner, "I32", optional=not self.act_order),
        )


@dataclass(frozen=True)
class Awq(Format):
    """AWQ: int32 words of eight 4-bit codes along the output, zeros and scales a group of inputs."""

    group: int
    name = "awq"

    def store(self, linear: Linear) -> tuple[TensorSpec, ...]:
        turned, words = linear.turned(), AWQ_WORDS.count
        out, groups = linear.out.coarse(words), linear.inner.coarse(self.group) if self.group > 0 else SCALAR
        return (
            turned.tensor("weight", ".qweight", out, linear.inner, "I32", words, packing=AWQ_WORDS),
            turned.tensor("zeros", ".qzeros", out, groups, "I32", packing=AWQ_WORDS),
            turned.tensor("scale", ".scales", linear.out, groups, "F16"),
        )


@dataclass(frozen=True)
class PackedInt(Format):
    """compressed-tensors `pack-quantized`: int32 words along the input, scales a group, the unpacked shape beside."""

    bits: int
    group: int
    symmetric: bool
    act_order: bool
    name = "compressed-tensors int"

    def store(self, linear: Linear) -> tuple[TensorSpec, ...]:
        pack = 32 // self.bits
        groups = linear.inner.coarse(self.group) if self.group > 0 else SCALAR
        if self.act_order and self.group > 0:
            groups = fixed(linear.inner.length).coarse(self.group)  # all of them: an input may be of any
        words, inner = in_words(self.bits), linear.inner.coarse(pack)
        parts = [
            linear.tensor("weight", ".weight_packed", linear.out, inner, "I32", pack, packing=words),
            linear.tensor("scale", ".weight_scale", linear.out, groups, linear.dtype),
        ]
        if not self.symmetric:
            name, out = ".weight_zero_point", linear.out.coarse(pack)
            parts.append(linear.tensor("zeros", name, out, groups, "I32", packing=in_words(self.bits, -2)))
        if self.act_order:
            parts.append(linear.tensor("group_index", ".weight_g_idx", None, linear.inner, "I32"))
        parts.append(linear.tensor("shape", ".weight_shape", fixed(2), None, "I64", optional=True))
        return tuple(parts)


NVFP4 = Packed4(16, "nvfp4", global_scale="weight_scale_2", input_scale="input_scale")
"""As ModelOpt writes it."""
NVFP4_WEIGHT_ONLY = Packed4(16, "nvfp4", global_scale="weight_scale_2")
NVFP4_COMPRESSED = Packed4(
    16,
    "nvfp4",
    "weight_packed",
    global_divisor="weight_global_scale",
    input_scale="input_global_scale",
    one_element=True,
)
MXFP4_COMPRESSED = Packed4(32, "mxfp4", "weight_packed", scale_dtype="U8")
MXFP8 = Fp8(block=(1, 32), scale_dtype="U8")


class Mxfp4Blocks(Format):
    """gpt-oss: `_blocks` [E, rows, in / 32, 16 bytes] and `_scales` [E, rows, in / 32]. Rows are outputs."""

    name = "mxfp4"

    def store(self, linear: Linear) -> tuple[TensorSpec, ...]:
        blocks = linear.inner.coarse(32)
        dims = (*linear.lead, linear.out, blocks)
        return (
            TensorSpec(
                f"{linear.role}.weight", f"{linear.name}_blocks", (*dims, fixed(16)), "U8", 2, packing=PAIRS_IN_BLOCKS
            ),
            TensorSpec(f"{linear.role}.scale", f"{linear.name}_scales", dims, "U8", 0),
        )


def bias(linear: Linear, row_parallel: bool) -> TensorSpec:
    """The bias of a linear layer; that of a row-parallel one is whole on every rank and added once."""
    name = linear.name + (".bias" if linear.suffix == ".weight" else "_bias")
    return TensorSpec(
        f"{linear.role}.bias",
        name,
        (*linear.lead, linear.out),
        linear.dtype,
        row_parallel_bias=row_parallel,
        experts=linear.experts,
    )
