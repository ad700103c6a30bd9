"""What all MoE operators agree on: activation numbers, argument checks, the local expert range, the mapping text.

Weight names: w1 = gate, w3 = up, w2 = down; y = w2(act(x w1^T) * (x w3^T)), not gated: y = w2(act(x w1^T)).
"""

import functools
import json
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.partition import extent

SILU, SWIGLU, RELU2 = 4, 5, 8
_NAMES = {SILU: "Silu", SWIGLU: "Swiglu", RELU2: "Relu2"}


def activation(name: str, is_gated_mlp: bool, act_fn: int) -> str:
    """'silu' (gated SiLU: Silu and Swiglu) or 'relu2' (not gated: relu squared); ValueError for another pair."""
    if is_gated_mlp and act_fn in (SILU, SWIGLU):
        return "silu"
    if not is_gated_mlp and act_fn == RELU2:
        return "relu2"
    raise ValueError(
        f"{name}: is_gated_mlp={is_gated_mlp} with act_fn={act_fn} ({_NAMES.get(act_fn, 'other')}); legal are gated "
        f"with Silu ({SILU}) or Swiglu ({SWIGLU}), and not gated with Relu2 ({RELU2})"
    )


def reference_activation(name: str, act_fn: int):
    """Elementwise function of the gate, or of what stands alone: unlike the kernels (`activation`), the reference takes
    SiLU and relu2 with and without a gate."""
    if act_fn in (SILU, SWIGLU):
        return F.silu
    if act_fn == RELU2:
        return lambda values: F.relu(values).square()
    raise ValueError(f"{name}: act_fn={act_fn}; legal are Silu ({SILU}), Swiglu ({SWIGLU}) and Relu2 ({RELU2})")


def as_tokens(name: str, label: str, x: Tensor) -> Tensor:
    """`x` as [T, H]; errors unless it is floating point and has at least two dimensions."""
    if x.dim() < 2:
        raise ValueError(f"{name}: {label} must be [T, H] or [B, S, H], got {tuple(x.shape)}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name}: {label} must be floating point, got {x.dtype}")
    return x.reshape(-1, x.shape[-1])


def check_device(name: str, x: Tensor, **others: Tensor) -> None:
    """ValueError for a tensor that does not lie where x lies: kernels would read its address on the wrong device."""
    for label, tensor in others.items():
        if tensor.device != x.device:
            raise ValueError(f"{name}: {label} lies on {tensor.device}, the tokens on {x.device}; move one of them")


def check_shapes(name: str, sizes: str, **wanted: tuple[Tensor, tuple[int, ...]]) -> None:
    """ValueError for the first tensor that has not its shape; `sizes` says where the shapes come from."""
    for label, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: {label} must be {list(shape)} ({sizes}), got {list(tensor.shape)}")


def check_routing(name: str, x: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
    """`x` as [T, H]; errors unless ids and weights are [T, K] with integer ids."""
    tokens = as_tokens(name, "x", x)
    if selected_experts.dim() != 2 or selected_experts.shape[0] != tokens.shape[0]:
        raise ValueError(
            f"{name}: selected_experts must be [T, K] with T = {tokens.shape[0]}, got {tuple(selected_experts.shape)}"
        )
    if selected_experts.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: selected_experts must be int32 or int64, got {selected_experts.dtype}")
    if routing_weights.shape != selected_experts.shape:
        raise ValueError(
            f"{name}: routing_weights {tuple(routing_weights.shape)} must have the shape of selected_experts "
            f"{tuple(selected_experts.shape)}"
        )
    check_device(name, x, selected_experts=selected_experts, routing_weights=routing_weights)
    return tokens


def check_stacked(name: str, x: Tensor, first: Tensor, second: Tensor, gated: bool, packed: int = 1) -> tuple[int, int]:
    """(experts, intermediate) of stacked weights first [E, 2I or I, H/packed] and second [E, H, I/packed]."""
    hidden = x.shape[-1]
    check_device(name, x, **{"the first stacked weight": first, "the second stacked weight": second})
    if first.dim() != 3 or second.dim() != 3:
        raise ValueError(f"{name}: stacked weights must have 3 dimensions, got {first.dim()} and {second.dim()}")
    intermediate = first.shape[1] // (2 if gated else 1)
    legal = (
        first.shape[2] * packed == hidden
        and tuple(second.shape) == (first.shape[0], hidden, intermediate // packed)
        and first.shape[1] == intermediate * (2 if gated else 1)
    )
    if not legal:
        rows = "2I" if gated else "I"
        raise ValueError(
            f"{name}: weights {tuple(first.shape)} and {tuple(second.shape)} do not fit x [..., {hidden}]; need "
            f"[E, {rows}, H{'/2' if packed == 2 else ''}] and [E, H, I{'/2' if packed == 2 else ''}]"
        )
    return first.shape[0], intermediate


def check_contiguous(name: str, **weights: Tensor) -> None:
    """ValueError for a weight that is not contiguous: copying it at each call would be too slow."""
    for label, weight in weights.items():
        if not weight.is_contiguous():
            raise ValueError(
                f"{name}: {label} {tuple(weight.shape)} has strides {weight.stride()}; call .contiguous() on it once, "
                "at load"
            )


def check_same_dtype(name: str, x: Tensor, *weights: Tensor) -> None:
    """TypeError unless x and the weights share one floating dtype."""
    if not x.dtype.is_floating_point or any(weight.dtype != x.dtype for weight in weights):
        raise TypeError(f"{name}: x and weights must share a dtype, got {[str(t.dtype) for t in (x, *weights)]}")


def like_x(x: Tensor, *_args, **_options) -> Tensor:
    """Fake of the operators: a contiguous result of x's shape and dtype."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class FP8Scales:
    """Scales of an e4m3 mixture, float32: value = code * scale."""

    input: Tensor
    """[1], of x"""
    first: Tensor
    """[E], or of blocks of 128 x 128 weights [E, rows/128, columns/128], of the first product"""
    inner: Tensor
    """[1], of the activation"""
    second: Tensor
    """as `first`, of the second product"""
    factored: bool
    """`first` and `second` are the weights' own, to be multiplied with the activations' `input` and `inner`; otherwise
    they hold that product, and `inner` is a reciprocal."""

    @property
    def blocks(self) -> bool:
        """Weights have a scale for every block of 128 x 128."""
        return self.first.dim() == 3


@dataclass(frozen=True)
class WeightScales:
    """Scales of e4m3 weights alone, float32: value = code * scale. Activations are not quantised."""

    first: Tensor
    """[E, ceil(rows/128), ceil(columns/128)] of tiles of the first product, or [E, rows] of its output channels"""
    second: Tensor
    """as `first`, of the second product"""

    @property
    def tiled(self) -> bool:
        """One scale a tile; else one an output channel."""
        return self.first.dim() == 3


def check_fp8(name: str, first: Tensor, second: Tensor, gated: bool, *scales: Tensor, blocks: bool = False) -> None:
    """TypeError unless the weights are e4m3; ValueError unless `scales`, of first and second, fit them.

    blocks   scales of 128 x 128 weights are legal too
    """
    if first.dtype != torch.float8_e4m3fn or second.dtype != torch.float8_e4m3fn:
        raise TypeError(f"{name}: weights must be float8_e4m3fn, got {first.dtype} and {second.dtype}")
    experts = first.shape[0]
    for scale, weight, halves in zip(scales, (first, second), (1 + gated, 1), strict=True):
        tiles = (experts, halves * -(-weight.shape[1] // halves // 128), -(-weight.shape[2] // 128))
        if tuple(scale.shape) != (experts,) and not (blocks and tuple(scale.shape) == tiles):
            other = f" or, for blocks of 128 x 128, {list(tiles)}" if blocks else ""
            raise ValueError(
                f"{name}: scales of the weights must be [E] = [{experts}]{other}, got {tuple(scale.shape)}"
            )
    if len({scale.dim() for scale in scales}) > 1:
        raise ValueError(f"{name}: both weights must be scaled by expert or both by block")


def first_scale(name: str, label: str, scale: Tensor, experts: int) -> Tensor:
    """Float32 [1], the first of a scale of one element or one an expert; ValueError for another number of them."""
    check_elements(name, label, scale, experts)
    return scale.reshape(-1)[:1].float()


def check_elements(name: str, label: str, scale: Tensor, experts: int) -> None:
    """ValueError unless a scale has one element or one an expert."""
    if scale.numel() not in (1, experts):
        raise ValueError(f"{name}: {label} must have 1 or {experts} elements, got {tuple(scale.shape)}")


@dataclass(frozen=True)
class ExpertMapping:
    """The part of a serialised mapping that the operators read: a JSON object with these names, others ignored."""

    enable_attention_dp: bool = False
    moe_ep_size: int = 1
    num_experts: int = 0
    """Experts of the whole layer; 0: every rank holds as many as this one."""

    @property
    def exchanges_tokens(self) -> bool:
        """Tokens are data-parallel and experts are not: the operator moves tokens to their experts."""
        return self.enable_attention_dp and self.moe_ep_size > 1

    def local_range(self, local_experts: int, rank: int) -> tuple[int, int]:
        """Global ids [start, stop) of the experts of `rank`, which holds `local_experts` of them."""
        start, stop = extent(self.num_experts or local_experts * self.moe_ep_size, self.moe_ep_size, rank)
        if stop - start != local_experts:
            raise ValueError(
                f"mapping_config: rank {rank} of {self.moe_ep_size} holds {local_experts} experts, but its share of "
                f"num_experts={self.num_experts} is {stop - start}"
            )
        return start, stop


@functools.cache
def parse_mapping(text: str) -> ExpertMapping:
    """ExpertMapping of a `mapping_config` argument; "" means none. ValueError for other than JSON objects and types."""
    if not text:
        return ExpertMapping()
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"mapping_config is not JSON: {error}; got {text[:80]!r}") from None
    if not isinstance(values, dict):
        raise ValueError(f"mapping_config must be a JSON object, got {text[:80]!r}")
    known = {field.name: values[field.name] for field in fields(ExpertMapping) if field.name in values}
    for name, value in known.items():
        wanted = type(getattr(ExpertMapping, name))
        if type(value) is not wanted:
            raise ValueError(f"mapping_config: {name} must be of type {wanted.__name__}, got {value!r}")
    return ExpertMapping(**known)
