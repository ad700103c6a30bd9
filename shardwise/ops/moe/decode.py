"""Mixture of experts for one token (or a few): routing, gate/up and down as matrix-vector products, two launches.

Not registered operators: the runtime's fused decode step calls them directly, behind the router's product. Each program
of the first launch finds its token's experts from the logits by itself, which costs less than a launch for it. The
second launch sums a token's experts in the order of its choices, so nothing is left to combine. Every expert's weights
are read once for each token that chose it: for many tokens the grouped products of this folder read less.

Weights bf16, fp16, float32, float8 with scales of tiles or channels, or packed: 4-bit integers in groups, or MXFP4 (of
the narrow format, multiplied with bf16); float32 sums. CUDA only, or Triton's interpreter with fp16 and float32.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardwise.ops.gluon_support import GLUON
from shardwise.ops.moe.decode_int4 import int4_down, int4_up
from shardwise.ops.moe.decode_kernels import plain_down, plain_up
from shardwise.ops.moe.decode_packed import packed_down, packed_up
from shardwise.ops.moe.int4 import Tile as Int4Tile
from shardwise.ops.moe.mxfp4_layout import TILE, PackedMXFP4
from shardwise.ops.quantization.float8 import Float8Weight
from shardwise.ops.quantization.int4_weight import SLAB, Int4Stack
from shardwise.ops.triton_support import interpreting, multiprocessors, triton

Experts = Tensor | PackedMXFP4 | Float8Weight | Int4Stack
"""Stacked weights of experts."""
MOST_EXPERTS = 512
"""Of a model: a program compares all logits with all."""
MOST_CHOICES = 32
"""Of a token with plain weights: a lane of the warp that sums them has each."""
MOST_MXFP4_CHOICES, MOST_INT4_CHOICES = 8, 16
"""Of a token with packed weights: a warp has each."""
UP_DEPTH, DOWN_DEPTH = 6, 8
"""Tiles of packed weights that a warp has on their way. With 5 and 5 a step of gpt-oss-20b took 10 % more (H200)."""
_PACKED_PER_SM, _PACKED_REGISTERS = 3, 80
"""Programs of eight warps that a multiprocessor holds at once, and the registers of a thread that let it."""


@dataclass(frozen=True)
class Tile:
    """Rows and warps of a program for plain weights, and its tiles on their way or in use."""

    rows: int
    warps: int
    width: int = 8
    """Elements of a thread, so many that each finds its part of x by itself."""
    stages: int = 3

    @property
    def columns(self) -> int:
        return 32 * self.width * self.warps


UP_TILE, DOWN_TILE = Tile(4, 1), Tile(8, 1, stages=4)
FLOAT8_UP_TILE, FLOAT8_DOWN_TILE = Tile(4, 1, 16), Tile(8, 1, 16, stages=4)
INT4_UP_TILE, INT4_DOWN_TILE = Int4Tile(2, 4, 4), Int4Tile(1, 8, 12)
PLAIN_PER_SM = 8
"""Programs of plain weights for each multiprocessor. Swept, as the tiles, on H100 and H200 for Qwen3-30B-A3B."""
SMALL, SMALL_UP_TILE, SMALL_DOWN_TILE, SMALL_PER_SM = 512, Tile(4, 1, stages=5), Tile(2, 1, stages=8), 12
"""Of experts with at most so many rows, which take short programs: a step of Qwen3-Next (24 layers, H200) took 1.63 ms
with these, 1.75 with those of larger experts."""


@dataclass(frozen=True)
class Choice:
    """How a token's experts follow from its logits: the largest, lowest number first among equals."""

    top_k: int
    normalize: bool
    """Softmax over the chosen; else over all."""
    scale: float = 1.0


@dataclass(frozen=True)
class Gate:
    """What lies between the two products: silu(gate) * up, or gpt-oss' clamped form."""

    alpha: float = 1.0
    limit: float | None = None


@dataclass(frozen=True)
class Routed:
    """What the second product needs of the first."""

    ids: Tensor
    """int32 [T, K], slots of local experts, -1 for others'; a shared expert comes last, behind the local ones"""
    weights: Tensor
    """float32 [T, K]"""
    inner: Tensor
    """[T * K, I], the activations, float32 or with packed weights in x's dtype; not written for pairs of other ranks"""


@dataclass(frozen=True)
class SharedExpert:
    """One more choice of every token, of the size of the routed experts and stored as they are: its weight is the
    sigmoid of the logit behind theirs."""

    up_gate: Tensor | Float8Weight
    """[2I, H], gate rows before up rows"""
    down: Tensor | Float8Weight
    """[H, I]"""

    def fits(self, up_gate: Experts, down: Experts) -> bool:
        """Whether such routed experts [local, 2I, H] and [local, H, I] are of the same size and form."""
        return all(
            not isinstance(stacked, PackedMXFP4 | Int4Stack)
            and own.shape == stacked.shape[1:]
            and _grain(own) == _grain(stacked)
            for own, stacked in ((self.up_gate, up_gate), (self.down, down))
        )


def expert_up(
    x: Tensor,  # [T, H], normed; bf16 with packed weights on a GPU
    logits: Tensor,  # float32 [T, E], with a shared expert [T, E + 1]
    slots: Tensor,  # int32 [E], local slot of each expert, -1 for others'
    choice: Choice,
    weight: Experts,  # [local, 2I, H], up rows before gate rows; MXFP4: gate and up rows in pairs
    gate: Gate,
    *,
    bias: Tensor | None = None,  # [local, 2I], of plain weights
    positions: Tensor | None = None,  # int32 [T], negative for rows of padding, which choose nothing
    shared: SharedExpert | None = None,  # beside plain weights
    pdl: bool = False,
) -> Routed:
    """Route, and the first product of every chosen local expert with its activation."""
    (tokens, hidden), experts = x.shape, slots.shape[0]
    choices = choice.top_k + (shared is not None)
    pairs = tokens * choices
    _check(choices, experts, weight)
    rows = weight.rows if isinstance(weight, PackedMXFP4) else weight.shape[1]
    size, device = rows // 2, x.device
    routed = Routed(
        torch.empty(tokens, choices, dtype=torch.int32, device=device),
        torch.empty(tokens, choices, dtype=torch.float32, device=device),
        torch.empty(pairs, size, dtype=x.dtype if is_packed(weight) else torch.float32, device=device),
    )
    pdl = pdl and not interpreting()
    common = (
        x, logits, slots, positions, routed.ids, routed.weights, routed.inner,
        size, hidden, experts, logits.stride(0), choice.scale, gate.alpha, gate.limit or 0.0,
    )  # fmt: skip
    flags = dict(
        TOP_K=choice.top_k, E_BLOCK=max(32, triton.next_power_of_2(experts)), NORMALIZE=choice.normalize,
        PADDED=positions is not None, CLAMPED=gate.limit is not None, PDL=pdl, launch_pdl=pdl,
    )  # fmt: skip
    if isinstance(weight, PackedMXFP4):
        # Of this rank's share of the pairs: where programs of eight warps do not all fit at once, four each.
        expected = weight.words.shape[1] * pairs * weight.words.shape[0] / experts
        warps = 8 if expected <= _PACKED_PER_SM * multiprocessors(device) else 4
        packed_up[(weight.words.shape[1], pairs)](
            *common, weight.words, weight.scales, weight.bias, *weight.words.shape[1:3],
            DEPTH=UP_DEPTH, EVEN=hidden % TILE == 0, WARPS=warps, INTERPRET=interpreting(), num_warps=warps,
            maxnreg=_PACKED_REGISTERS, **flags,
        )  # fmt: skip
    elif isinstance(weight, Int4Stack):
        packed_tile = INT4_UP_TILE
        int4_up[(triton.cdiv(size // SLAB, packed_tile.slabs // 2), pairs)](
            *common, weight.words, weight.weight.scales, **packed_tile.constants(weight), num_warps=packed_tile.warps,
            **flags,
        )  # fmt: skip
    else:
        grain = _grain(weight)
        tile, per_processor = _up_tile(size, grain)
        blocks = triton.cdiv(size, tile.rows)
        programs = triton.cdiv(per_processor * multiprocessors(device), choices)
        plain_up[(min(blocks, programs), pairs)](
            *common, *_as_stored(weight), bias, *_as_stored(None if shared is None else shared.up_gate),
            weight.shape[0], GRAIN=grain, BLOCK_N=tile.rows, BLOCK_K=tile.columns, STAGES=tile.stages,
            BIAS=bias is not None, SHARED=shared is not None, num_warps=tile.warps, **flags,
        )  # fmt: skip
    return routed


def expert_down(
    routed: Routed,
    weight: Experts,  # [local, H, I]
    *,
    bias: Tensor | None = None,  # [local, H], of plain weights
    residual: Tensor | None = None,  # [T, H]
    shared: SharedExpert | None = None,  # as the first product had it
    dtype: torch.dtype = torch.bfloat16,
    pdl: bool = False,
) -> Tensor:
    """Sum over each token's local experts of weight * (down product + bias), plus the residual: [T, H] in `dtype`."""
    tokens, choices = routed.ids.shape
    size, inner = routed.inner.shape[1], routed.inner
    hidden = weight.rows if isinstance(weight, PackedMXFP4) else weight.shape[1]
    out = torch.empty(tokens, hidden, dtype=dtype, device=inner.device)
    pdl = pdl and not interpreting()
    common = (inner, routed.ids, routed.weights, residual, out, hidden, size)
    flags = dict(CHOICES=choices, RESIDUAL=residual is not None, PDL=pdl, launch_pdl=pdl)
    if isinstance(weight, PackedMXFP4):
        packed_down[(weight.words.shape[1] * 4, tokens)](
            *common, weight.words, weight.scales, weight.bias, *weight.words.shape[1:3],
            DEPTH=DOWN_DEPTH, EVEN=size % TILE == 0, WARPS=8, INTERPRET=interpreting(), num_warps=8, **flags,
        )  # fmt: skip
    elif isinstance(weight, Int4Stack):
        packed_tile = INT4_DOWN_TILE
        if choices > packed_tile.warps:
            packed_tile = replace(packed_tile, warps=MOST_INT4_CHOICES)
        int4_down[(triton.cdiv(hidden // SLAB, packed_tile.slabs), tokens)](
            *common, weight.words, weight.weight.scales, **packed_tile.constants(weight), num_warps=packed_tile.warps,
            **flags,
        )  # fmt: skip
    else:
        grain = _grain(weight)
        tile = _down_tile(size, grain)
        plain_down[(triton.cdiv(hidden, tile.rows), tokens)](
            *common, *_as_stored(weight), bias, *_as_stored(None if shared is None else shared.down),
            weight.shape[0], GRAIN=grain, BLOCK_N=tile.rows, BLOCK_K=tile.columns, STAGES=tile.stages,
            BIAS=bias is not None, SHARED=shared is not None, num_warps=tile.warps, **flags,
        )  # fmt: skip
    return out


def _up_tile(size: int, grain: str) -> tuple[Tile, int]:
    """And the programs for each multiprocessor."""
    if grain:
        return FLOAT8_UP_TILE, PLAIN_PER_SM
    return (SMALL_UP_TILE, SMALL_PER_SM) if size <= SMALL else (UP_TILE, PLAIN_PER_SM)


def _down_tile(size: int, grain: str) -> Tile:
    if grain:
        return FLOAT8_DOWN_TILE
    return SMALL_DOWN_TILE if size <= SMALL else DOWN_TILE


def is_packed(weight: Experts) -> bool:
    """Whether its products are those of 16-bit floats."""
    return isinstance(weight, PackedMXFP4 | Int4Stack)


def most_choices(weight: Experts) -> int:
    """Of a token, with such weights."""
    if isinstance(weight, PackedMXFP4):
        return MOST_MXFP4_CHOICES
    return MOST_INT4_CHOICES if isinstance(weight, Int4Stack) else MOST_CHOICES


def reason_against(experts: int, choices: int, most: int = MOST_CHOICES) -> str:
    """Why these kernels cannot serve a model's experts, `choices` of a token, a shared one among them; empty when they
    can."""
    if experts > MOST_EXPERTS:
        return f"{experts} experts, at most {MOST_EXPERTS}"
    return f"{choices} experts a token, at most {most}" if choices > most else ""


def takes_packed(weight: PackedMXFP4) -> bool:
    """Whether these weights are of the format that the kernels unpack, and Triton has the language they are in."""
    return GLUON and weight.format == "narrow"


def _as_stored(weight: Tensor | Float8Weight | None) -> tuple[Tensor | None, Tensor | None]:
    """Elements and scales; None for what there is not."""
    return (weight.codes, weight.scales) if isinstance(weight, Float8Weight) else (weight, None)


def _grain(weight: Experts) -> str:
    """What a scale of plain weights stands for; empty without scales."""
    return ("tile" if weight.tiled else "channel") if isinstance(weight, Float8Weight) else ""


def _check(choices: int, experts: int, weight: Experts) -> None:
    reason = reason_against(experts, choices, most_choices(weight))
    if reason:
        raise ValueError(f"expert_up: {reason}")
    if not (weight if isinstance(weight, Tensor) else weight.words).is_contiguous():
        raise ValueError("expert_up: the experts' weights must be contiguous")
    if isinstance(weight, PackedMXFP4) and not takes_packed(weight):
        raise ValueError(f"expert_up: packed weights of format {weight.format}; legal: narrow, with Triton's Gluon")
