"""What the in-place causal convolutions share: argument checks, the split into prefill and decode, planned launches."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from torch import Tensor

from shardwise.ops.attention.batch import Batch, read_batch
from shardwise.ops.devices import require_one_device
from shardwise.ops.dtypes import check_cache, check_float
from shardwise.ops.state_batch import check_counts, check_metadata
from shardwise.plan_cache import PlanCache, Tensors, allocator, taken_as_given

_Launches = TypeVar("_Launches")


class ConvBatch(NamedTuple):
    """x [b, s, C] as given: only one of b and s exceeds 1, x_t leads from token to token and x_c between channels.

    weight [C, 1, K] or [C, K], bias [C] or None, slots, and with prefill tokens bounds and resumes are contiguous;
    cache [slots, C, K - 1].
    """

    batch: Batch
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    bounds: Tensor
    slots: Tensor
    resumes: Tensor
    cache: Tensor
    channels: int
    K: int
    x_t: int
    x_c: int
    silu: bool

    @property
    def tensors(self) -> Tensors:
        """Input, weight, bias (or weight, unused), slots, cache."""
        return self.x, self.weight, self.weight if self.bias is None else self.bias, self.slots, self.cache

    @property
    def metadata(self) -> Tensors:
        """cu_seqlen and use_initial_states where there are prefill tokens."""
        return (self.bounds, self.resumes) if self.batch.prefill_tokens else ()


def run_step(
    op: str, plans: PlanCache[_Launches], plan: Callable[[ConvBatch], _Launches],
    run: Callable[[_Launches, Tensors, Tensors], None], batch_info_host, input, weight, bias, cu_seqlen, slot_idx,
    use_initial_states, conv_state_cache, activation,
) -> None:  # fmt: skip
    """One call of the operator `op`: its arguments are checked and its launches planned once for each layout.

    plans  launches of steps whose tensors are taken as they are, by their layout
    run    launches with `ConvBatch.tensors` and `ConvBatch.metadata`
    """
    batch = read_batch(op, batch_info_host)
    check_metadata(op, batch, input, cu_seqlen, slot_idx, use_initial_states, conv_state_cache)
    given: Tensors = (input, weight, weight if bias is None else bias, slot_idx, conv_state_cache)
    metadata: Tensors = (cu_seqlen, use_initial_states) if batch.prefill_tokens else ()
    key = batch, bias is None, activation
    compared = (*given, *metadata) if bias is not None else (input, weight, *given[3:], *metadata)
    launches = plans.get(key, compared)
    if launches is None:
        require_one_device(op, *compared)
        one = prepare(
            op, batch, input, weight, bias, cu_seqlen, slot_idx, use_initial_states, conv_state_cache, activation
        )
        launches = plan(one)
        if taken_as_given((*one.tensors, *one.metadata), (*given, *metadata)):
            plans.keep(key, compared, launches)
        given, metadata = one.tensors, one.metadata
    run(launches, given, metadata)


def prepare(op: str, batch: Batch, input, weight, bias, cu_seqlen, slot_idx, resumes, cache, activation) -> ConvBatch:
    """Checked arguments; raises ValueError."""
    if activation not in (None, "silu"):
        raise ValueError(f"{op}: activation must be None or 'silu', got {activation!r}")
    shape, K = input.shape, weight.shape[-1]
    channels = shape[-1]
    if len(shape) != 3 or weight.numel() != channels * K or weight.shape[0] != channels:
        raise ValueError(
            f"{op}: input must be [b, s, C] and weight [C, 1, K] or [C, K], got {tuple(shape)} and "
            f"{tuple(weight.shape)}"
        )
    if cache.shape != (cache.shape[0], channels, K - 1) or K < 2:
        raise ValueError(
            f"{op}: conv_state_cache must be [slots, C = {channels}, K - 1 = {K - 1}], got {tuple(cache.shape)}"
        )
    check_float(op, "input", input)
    check_cache(op, "conv_state_cache", cache)
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"{op}: bias must be [{channels}], got {tuple(bias.shape)}")
    rows = shape[0] * shape[1]
    check_counts(op, batch, rows, slot_idx, resumes)
    if batch.prefill and cu_seqlen.numel() < batch.prefill + 1:
        raise ValueError(f"{op}: cu_seqlen has {cu_seqlen.numel()} entries; {batch.prefill} sequences need one more")
    if shape[0] != 1 and shape[1] != 1:
        input = input.view(1, rows, channels)
        shape = input.shape
    if batch.prefill_tokens:
        cu_seqlen, resumes = cu_seqlen.contiguous(), resumes.contiguous()
    strides = input.stride()
    return ConvBatch(
        batch, input, weight.contiguous(), None if bias is None else bias.contiguous(), cu_seqlen,
        slot_idx.contiguous(), resumes, cache, channels, K, strides[0] if shape[1] == 1 else strides[1], strides[2],
        activation == "silu",
    )  # fmt: skip


def nothing(input, weight, *_args) -> None:
    """Fake of the in-place operators."""
    return None


def block_rows(one: ConvBatch) -> int:
    """Tokens of a prefill block, 16 to 128, or K - 1 where that is more, so that all it needs lies in one predecessor.

    Large blocks move less: a block moves its own rows twice and K - 1 more rows three times. But the device needs 2^16
    threads of eight channels, or the memory's queues are not full.
    """
    threads = one.batch.prefill_tokens * one.channels // 8
    return max(1 << min(max((threads >> 17).bit_length(), 4), 7), one.K - 1)


def blocks_of(one: ConvBatch, rows: int) -> tuple[int, Callable[[], Tensor]]:
    """(blocks of `rows` prefill tokens at most, each sequence begins a new one; what allocates the K - 1 inputs before
    each)."""
    blocks = -(-one.batch.prefill_tokens // rows) + one.batch.prefill
    return blocks, allocator((blocks, one.K - 1, one.channels), one.x.dtype, one.x.device)
