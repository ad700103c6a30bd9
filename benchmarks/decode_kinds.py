"""The kernels of a fused decode step by kind, each with a launch for every layer, on inputs that stay.

`decode_step.py` times them. Bytes are those that one launch must read.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.ops.linear.decode import skinny_linear
from shardwise.ops.moe.decode import expert_down, expert_up
from shardwise.parallel.decode_attention import AttentionStep, LatentStep
from shardwise.parallel.decode_moe import ExpertStep
from shardwise.parallel.decode_states import SingleSpans, StateStep
from shardwise.parallel.decode_step import DecodeStep
from shardwise.parallel.decode_stream import SKINNY_ROWS, Product
from shardwise.parallel.decoder import Decoder
from shardwise.parallel.layers import GatedMlp
from shardwise.parallel.memory import memory_bytes
from shardwise.parallel.moe import PackedExperts

EPS = 1e-5
Calls = list[Callable[[], object]]


@dataclass(frozen=True)
class Kind:
    """One kind of kernel: a launch for each layer, and the bytes that one reads."""

    calls: Calls
    nbytes: float


def kinds(decoder: Decoder, step: DecodeStep, batch: int, context: int) -> dict[str, Kind]:
    """By name, for `batch` sequences of `context` tokens; experts and the dense layer only where tokens are few."""
    norm = torch.ones(step.head.weight.shape[1], device=step.cache.device, dtype=step.cache.dtype)
    x = torch.randn(batch, len(norm), device=norm.device).to(norm.dtype)
    positions = torch.full((batch,), context, device=x.device, dtype=torch.int32)
    group, residual = decoder.head.group, torch.randn_like(x)
    found = _products(step, x, norm) | _attention(step, positions)
    dense = [layer.feed_forward for layer in decoder.layers if isinstance(layer.feed_forward, GatedMlp)]
    if batch <= SKINNY_ROWS and dense:
        found |= _dense(dense, x, norm, step.pdl)
    inner = [getattr(layer.feed_forward, "routed", layer.feed_forward) for layer in step.layers]
    experts = [each for each in inner if isinstance(each, ExpertStep)]
    if experts and batch <= experts[0].most_few:
        found |= _experts(experts, x, positions)
    if group.size > 1:
        sums = [partial(group.all_reduce_residual_rms_norm, x, residual, norm, EPS)] * len(step.layers)
        found["all-reduce + residual + norm"] = Kind(sums, 2 * x.nbytes)
    return found


def _products(step: DecodeStep, x: Tensor, norm: Tensor) -> dict[str, Kind]:
    layers = [layer.mixer for layer in step.layers]
    states = [each for each in layers if isinstance(each, StateStep)]
    layers = [each for each in layers if not isinstance(each, StateStep)]
    firsts = [each.down if isinstance(each, LatentStep) else each.qkv for each in layers]
    ups = [each.q_up for each in layers if isinstance(each, LatentStep) and each.q_up is not None]
    found = {
        "qkv": Kind([_product(each, x, step.pdl, norm) for each in firsts], firsts[0].weight.nbytes),
        "out": _row_products([each.out for each in layers], x, step.pdl),
        "head": Kind([_product(step.head, x, step.pdl)] * 2, step.head.weight.nbytes),
    }
    if states:
        ins = [each.in_projs[0] for each in states]
        found["in (states)"] = Kind([_product(each, x, step.pdl, norm) for each in ins], ins[0].weight.nbytes)
        found["out (states)"] = _row_products([each.out for each in states], x, step.pdl)
        found["states"] = _state_steps(step, states, len(x))
    return found | ({"queries": _row_products(ups, x, step.pdl)} if ups else {})


def _state_steps(step: DecodeStep, layers: list[StateStep], batch: int) -> Kind:
    """Convolution and recurrent step, which read the states and write them."""
    device, states = step.cache.device, step.cache.states
    spans = SingleSpans(device)
    spans.place(torch.zeros(batch, device=device), torch.arange(batch, device=device, dtype=torch.int32))
    width = sum(len(each.weight) for each in layers[0].in_projs)
    calls = [
        partial(each.mixer.mix, torch.randn(batch, width, device=device).to(step.cache.dtype), spans, states)
        for each in layers
    ]
    return Kind(calls, 2 * batch * states.of(layers[0].mixer.layer).recurrent[0].nbytes)


def _row_products(products: list[Product], like: Tensor, pdl: bool) -> Kind:
    weight = products[0].weight
    inner = torch.randn(len(like), weight.shape[1], device=like.device).to(like.dtype)
    return Kind([_product(each, inner, pdl) for each in products], weight.nbytes)


def _product(product: Product, x: Tensor, pdl: bool, norm: Tensor | None = None) -> Callable[[], object]:
    if len(x) > SKINNY_ROWS:
        return partial(F.linear, x, product.weight, product.bias)
    normed = {} if norm is None else {"norm_weight": norm, "eps": EPS}
    return partial(skinny_linear, x, product.weight, bias=product.bias, pdl=pdl, **normed)


def _attention(step: DecodeStep, positions: Tensor) -> dict[str, Kind]:
    found, (batch,), context = {}, positions.shape, int(positions[0])
    slots = torch.arange(batch, device=positions.device, dtype=torch.int32)
    for name, windowed in (("attention", False), ("attention with a window", True)):
        attending = [s.mixer for s in step.layers if not isinstance(s.mixer, StateStep)]
        chosen = [each for each in attending if bool(each.mixer.masking.window) == windowed]
        if chosen:
            shape = step.cache.layers[chosen[0].mixer.layer]
            read = batch * min(context, shape.window or context) * shape.width * step.cache.dtype.itemsize
            found[name] = Kind([_attend(each, positions, slots) for each in chosen], read + _absorbed(chosen[0]))
    return found


def _attend(step: AttentionStep | LatentStep, positions: Tensor, slots: Tensor) -> Callable[[], object]:
    like = step.cache.pages(step.mixer.layer)[0]
    draw = lambda width: torch.randn(len(slots), width, device=like.device).to(like.dtype)  # noqa: E731
    if isinstance(step, AttentionStep):
        return partial(step.attend, draw(len(step.qkv.weight)), positions, slots)
    mixer, weights = step.mixer, step.mixer.weights
    queries = weights.heads * (weights.nope + mixer.key_width - weights.rank)
    return partial(step.attend, draw(queries), draw(mixer.key_width), positions, slots)


def _absorbed(step: AttentionStep | LatentStep) -> int:
    """Bytes of the weights that attention to latents reads."""
    return memory_bytes(step.mixer.weights) if isinstance(step, LatentStep) else 0


def _dense(layers: list[GatedMlp], x: Tensor, norm: Tensor, pdl: bool) -> dict[str, Kind]:
    products = [(Product.of(layer.gate_up), Product.of(layer.down)) for layer in layers]
    gate_up, down = products[0]
    wide = torch.randn(len(x), down.weight.shape[1], device=x.device).to(x.dtype)
    options = {"norm_weight": norm, "eps": EPS, "gated": True, "pdl": pdl}
    return {
        "gate and up": Kind(
            [partial(skinny_linear, x, g.weight, **options) for g, _ in products], gate_up.weight.nbytes
        ),
        "down": Kind([_product(d, wide, pdl) for _, d in products], down.weight.nbytes),
    }


def _experts(steps: list[ExpertStep], x: Tensor, positions: Tensor) -> dict[str, Kind]:
    ups: Calls = []
    downs: Calls = []
    chosen = []
    for step in steps:
        experts = step.block.experts
        biases = (getattr(experts, "up_gate_bias", None), getattr(experts, "down_bias", None))
        inputs = x if isinstance(experts, PackedExperts) else x.float()
        logits = torch.randn(len(x), len(step.router), device=x.device)
        args = (inputs, logits, step.slots, step.choice, experts.up_gate, step.gate)
        options = {"shared": step.shared, "pdl": step.pdl}
        up = partial(expert_up, *args, bias=biases[0], positions=positions, **options)
        routed = up()
        ups.append(up)
        downs.append(partial(expert_down, routed, experts.down, bias=biases[1], **options))
        chosen.append(int((routed.ids >= 0).sum()))
    first, mean = steps[0], statistics.mean(chosen)
    routers = [partial(skinny_linear, x, step.router, bias=step.bias, pdl=step.pdl) for step in steps]
    return {
        "router": Kind(routers, first.router.nbytes),
        "experts up": Kind(ups, mean * _of_one(first.block.experts.up_gate)),
        "experts down": Kind(downs, mean * _of_one(first.block.experts.down)),
    }


def _of_one(weight) -> float:
    """Bytes of one expert's matrix."""
    if hasattr(weight, "words"):
        return (weight.words.nbytes + weight.scales.nbytes) / weight.words.shape[0]
    return weight.nbytes / weight.shape[0]
