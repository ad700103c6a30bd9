"""Mixture-of-experts layers timed at real sizes, beside their peers and the floors of memory and matrix rate."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from shardwise.ops.moe import cutlass
from shardwise.ops.moe import triton as kernels
from shardwise.ops.moe.bench_peers import CutlassMixture, Raw, TritonKernels, triton_kernels_found
from shardwise.ops.moe.contract import SILU
from shardwise.ops.moe.mxfp4 import mxfp4_moe
from shardwise.ops.moe.mxfp4_layout import pack_mxfp4
from shardwise.ops.moe.reference import route, torch_moe_fused

Timer = Callable[..., Mapping[str, float]]
"""(lists of calls by label, eager=labels) to the microseconds of one call by label, all timed in turn, so that the
card's power limit meets all alike; calls of eager labels synchronise and cannot stand in a graph."""
LOOP = "expert loop"
"""The peer that synchronises: it asks which experts have tokens."""
FEW_TOKENS = 1024
"""Below, calls are so short that a graph holds 16 of them; from here on 2, as one peer's calls are timed one by one."""
ALPHA, LIMIT = 1.702, 7.0
"""Of gpt-oss' activation."""
INPUTS = 8
"""Token sets that calls take in turn, so that few tokens do not find their experts' weights in the L2 cache."""


@dataclass(frozen=True)
class Layer:
    """Sizes of one layer; `experts` may be a rank's share."""

    experts: int
    hidden: int
    size: int
    top_k: int
    format: str  # mxfp4, bf16 or fp8

    @property
    def expert_bytes(self) -> int:
        """Weights and scales of one expert."""
        values = 3 * self.hidden * self.size
        return {"mxfp4": values // 2 + values // 32, "bf16": 2 * values, "fp8": values}[self.format]

    def operations(self, tokens: int) -> int:
        """Floating-point operations of the matrix products."""
        return 6 * tokens * self.top_k * self.hidden * self.size


LAYERS = {
    "gpt-oss-120b": Layer(128, 2880, 2880, 4, "mxfp4"),
    "gpt-oss-20b": Layer(32, 2880, 2880, 4, "mxfp4"),
    "qwen3-30b-a3b": Layer(128, 2048, 768, 8, "bf16"),
    "qwen3-30b-a3b-fp8": Layer(128, 2048, 768, 8, "fp8"),
    "mixtral-8x7b": Layer(8, 4096, 14336, 2, "bf16"),
    "mixtral-8x7b-fp8": Layer(8, 4096, 14336, 2, "fp8"),
}


@dataclass(frozen=True)
class Row:
    """One measured size; times in microseconds."""

    layer: str
    experts: int
    tokens: int
    us: float
    active_experts: float  # mean over the token sets
    memory_floor_us: float  # active experts' weights once, at the rate of plain reads
    matrix_floor_us: float  # operations at the rate of a large bf16 product (e4m3 at twice that)
    peers_us: dict[str, float]


@dataclass(frozen=True)
class Ceilings:
    """What the device does at best: bytes and bf16 operations a microsecond."""

    copy: float  # bytes read and written
    read: float  # bytes that are only read, as weights are; at least what a copy moves
    operations: float


def measure_ceilings(time: Callable[[Callable[[], object]], float]) -> Ceilings:
    """A copy and a sum of 2 GiB, and a bf16 product of random matrices of 8192 x 8192; `time` in microseconds."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    source = torch.zeros(8 * size * size, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    moved = source.numel() * source.element_size()
    copy, read = 2 * moved / time(lambda: target.copy_(source)), moved / time(source.sum)
    return Ceilings(copy, max(read, copy), 2 * size**3 / time(lambda: a @ b))


def measure_layer(
    name: str, layer: Layer, token_counts: tuple[int, ...], time: Timer, ceilings: Ceilings, device: str = "cuda"
) -> Iterator[Row]:
    """Rows of one layer with random weights and the routing of random tokens, the same in every run."""
    calls_of = _mxfp4_calls(layer, device) if layer.format == "mxfp4" else _stacked_calls(layer, device)

    def drawn(rows: int, seed: int) -> torch.Tensor:
        draw = torch.Generator(device).manual_seed(seed)
        return torch.randn(rows, layer.hidden, device=device, generator=draw)

    router = drawn(layer.experts, 0) * layer.hidden**-0.5
    for tokens in token_counts:
        count = INPUTS if tokens < FEW_TOKENS else 2
        sets = list(drawn(count * tokens, tokens).bfloat16().split(tokens))
        routed = [route(x.float(), router, router.new_zeros(layer.experts), layer.top_k) for x in sets]
        calls = calls_of(list(zip(sets, *zip(*routed, strict=True), strict=True)), router)
        rounds = 2 if tokens < FEW_TOKENS else 1
        times = dict(time({label: each * rounds for label, each in calls.items()}, eager={LOOP}))
        active = sum(ids.unique().numel() for ids, _ in routed) / count
        peak = ceilings.operations * (2 if layer.format == "fp8" else 1)
        yield Row(
            layer=name,
            experts=layer.experts,
            tokens=tokens,
            us=times.pop("ours"),
            active_experts=active,
            memory_floor_us=active * layer.expert_bytes / ceilings.read,
            matrix_floor_us=layer.operations(tokens) / peak,
            peers_us=times,
        )


def _mxfp4_calls(layer: Layer, device: str):
    """The whole operator, routing included; the peer: OpenAI's triton_kernels where they are installed."""

    def matrix(rows: int, columns: int) -> Raw:
        blocks = torch.randint(0, 256, (layer.experts, rows, columns // 32, 16), dtype=torch.uint8, device=device)
        scales = torch.randint(117, 122, blocks.shape[:-1], dtype=torch.uint8, device=device)
        return blocks, scales, torch.randn(layer.experts, rows, device=device)

    raw_up, raw_down = matrix(2 * layer.size, layer.hidden), matrix(layer.hidden, layer.size)
    up, down = pack_mxfp4(*raw_up, paired=True), pack_mxfp4(*raw_down, paired=False)
    peer = TritonKernels(raw_up, raw_down, layer.top_k, ALPHA, LIMIT) if triton_kernels_found() else None

    def calls(inputs, router):
        weight, bias = router.bfloat16(), router.new_zeros(layer.experts)

        def one(x):
            return lambda: mxfp4_moe(x, weight, bias, layer.top_k, up, down, ALPHA, LIMIT, 0)

        found = {"ours": [one(x) for x, _, _ in inputs]}
        if peer is not None:
            found["triton_kernels"] = [partial(peer, x, weight, bias) for x, _, _ in inputs]
        return found

    return calls


def _stacked_calls(layer: Layer, device: str):
    """Given routing; peers: a loop over experts, FlashInfer's CUTLASS kernels where compiled, and bf16 beside fp8."""

    def randn(*shape, scale):
        return torch.randn(*shape, device=device, dtype=torch.bfloat16) * scale

    first = randn(layer.experts, 2 * layer.size, layer.hidden, scale=layer.hidden**-0.5)
    second = randn(layer.experts, layer.hidden, layer.size, scale=layer.size**-0.5)
    codes = [weight.to(torch.float8_e4m3fn) for weight in (first, second)] if layer.format == "fp8" else []
    one, ones = torch.ones(1, device=device), torch.ones(layer.experts, device=device)

    def calls(inputs, _router):
        def each(function):
            return [lambda x=x, ids=ids, w=w: function(x, ids, w) for x, ids, w in inputs]

        def bf16(x, ids, w):
            return kernels.triton_moe_fused(x, ids, w, first, second, True, SILU)

        def fp8(x, ids, w):
            return kernels.triton_quant_fp8_moe(
                x, ids, w, *codes, one, one, one, one, ones, ones, ones, True, SILU
            )  # fmt: skip

        if codes:
            found = {"ours": each(fp8), "ours in bf16": each(bf16)}
        else:
            found = {"ours": each(bf16), LOOP: each(lambda x, i, w: torch_moe_fused(x, i, w, first, second))}
        if cutlass.cutlass_ready():
            peer = CutlassMixture(*(codes or [first, second]))
            found["flashinfer"] = [partial(peer, x, ids.int(), w) for x, ids, w in inputs]
        return found

    return calls
