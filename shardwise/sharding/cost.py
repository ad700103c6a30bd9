"""What a plan costs on a machine: memory of the fullest rank, and the time of a prefill and of a decode step.

A step is max(bytes / bandwidth, operations / rate) + communication + launches. Bytes are what must be read once: the
weights that take part (of routed experts the expected share that the batch touches) and the cache. The fullest rank
decides, since all ranks wait for it. Nothing here is fitted to a model; the machine's figures are `topology.py`'s.
"""

from dataclasses import dataclass, fields
from math import prod

from shardwise.sharding.axes import MeshAxis
from shardwise.sharding.collectives import Collective
from shardwise.sharding.plan import Plan
from shardwise.sharding.spec import Attention, GatedDelta, Mamba2, MlaAttention, Moe
from shardwise.sharding.topology import Topology

KERNELS_PER_MIXER = 3
"""The fused decode step: projection, attention, output."""
KERNELS_PER_DENSE = 2
"""Gate and up, down."""
KERNELS_PER_MOE = 4
"""Routing, two grouped products, combine."""
KERNELS_PER_STEP = 4
"""Embedding, final norm with head, sampling."""
ACTIVATION_BYTES = 2
HIDDEN_VECTORS = 3
"""Alive at once a token: residual, normed input, partial output."""
INNER_VECTORS = 2
"""And the widest projection of a layer with its activation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What the ranks serve at once, over all of them."""

    batch: int = 1
    """Sequences."""
    context: int = 4096
    """Tokens a sequence when decoding."""
    prompt: int = 1024
    """New tokens a sequence in prefill, chunks of which are `chunk` tokens."""
    chunk: int = 8192
    """Most tokens of one prefill step on one data-parallel rank."""

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 1:
                raise ValueError(f"{field.name} is {value}, expected at least 1")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the fullest rank."""

    device: int
    weights: int
    cache: int
    workspace: int

    @property
    def left(self) -> int:
        return self.device - self.weights - self.cache - self.workspace

    @property
    def fits(self) -> bool:
        return self.left >= 0


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one step by cause. Memory traffic and arithmetic overlap; the rest adds up."""

    weights: float
    cache: float
    compute: float
    communication: float
    launch: float

    @property
    def total(self) -> float:
        return max(self.weights + self.cache, self.compute) + self.communication + self.launch

    @property
    def bound(self) -> str:
        """What takes longest."""
        parts = {"communication": self.communication, "launch": self.launch}
        if self.compute > self.weights + self.cache:
            parts["compute"] = self.compute
        else:
            parts |= {"weights": self.weights, "cache": self.cache}
        return max(parts, key=parts.__getitem__)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Cost of a plan under a workload."""

    memory: Memory
    decode: StepTime
    """One token of every sequence."""
    prefill: StepTime
    """All prompts of the batch."""
    batch: int

    @property
    def decode_tokens_per_second(self) -> float:
        return self.batch / self.decode.total


@dataclass(frozen=True, slots=True)
class Traffic:
    """Weights of one rank by how a step uses them: bytes read, and logical parameters multiplied."""

    dense_bytes: int
    dense_parameters: int
    expert_bytes: int
    expert_parameters: int
    eight_bit: bool
    """FP8 operands on both sides, so that products run at the 8-bit rate."""


def estimate(plan: Plan, topology: Topology, workload: Workload) -> Estimate:
    """Memory and time of `plan` on `topology`."""
    rank = plan.fullest_rank
    traffic = traffic_of(plan, rank)
    sequences = sequences_of(plan, workload)
    return Estimate(
        memory_of(plan, topology, workload, rank),
        _decode(plan, topology, workload, traffic, rank, sequences),
        _prefill(plan, topology, workload, traffic, rank, sequences),
        workload.batch,
    )


def memory_of(plan: Plan, topology: Topology, workload: Workload, rank: int) -> Memory:
    """Weights, cache of the rank's sequences, activations of one prefill chunk and logits of one step."""
    sequences = sequences_of(plan, workload)
    tokens = min(workload.chunk, sequences * workload.prompt)
    vectors = HIDDEN_VECTORS * plan.model.hidden + INNER_VECTORS * _widest(plan, rank)
    return Memory(
        topology.device.memory_bytes,
        plan.rank(rank).weight_bytes,
        plan.cache_bytes(rank, max(workload.context, workload.prompt), sequences),
        tokens * vectors * ACTIVATION_BYTES + sequences * plan.model.vocab * 4,
    )


def sequences_of(plan: Plan, workload: Workload) -> int:
    """Sequences of the workload that a rank serves: those of its data-parallel group."""
    return -(-workload.batch // plan.layout.attn_dp)


def cached_bytes(plan: Plan, workload: Workload, rank: int) -> int:
    """Cache of the rank when its sequences have reached the workload's context."""
    return plan.cache_bytes(rank, workload.context, sequences_of(plan, workload))


def _widest(plan: Plan, rank: int) -> int:
    """Elements a token of the rank's widest layer projection, of the chosen experts together where they are routed."""
    moe = _moe(plan)
    chosen = moe.routing.top_k if moe else 1
    widths = (
        held.local_shape[-2] * (chosen if held.routed else 1)
        for held in plan.held(rank)
        if held.pattern.layers and len(held.local_shape) in (2, 3)
    )
    return max(widths, default=0)


def traffic_of(plan: Plan, rank: int) -> Traffic:
    """Sums over the rank's patterns. An untied embedding is looked up, not streamed."""
    sums = {"dense": [0, 0], "expert": [0, 0]}
    eight = total = 0
    for held in plan.held(rank):
        spec, nbytes = held.pattern.spec, held.nbytes * held.count
        if spec.role == "embed.weight" and not plan.model.head.tied:
            continue
        into = sums["expert" if held.routed else "dense"]
        into[0] += nbytes
        into[1] += prod(held.local_shape) * spec.values * held.count
        total += nbytes
        eight += nbytes if spec.dtype.startswith("F8") else 0
    (dense_bytes, dense_parameters), (expert_bytes, expert_parameters) = sums["dense"], sums["expert"]
    return Traffic(dense_bytes, dense_parameters, expert_bytes, expert_parameters, eight > total / 2)


def _decode(plan: Plan, topology: Topology, work: Workload, traffic: Traffic, rank: int, sequences: int) -> StepTime:
    device = topology.device
    read = traffic.dense_bytes + traffic.expert_bytes * touched_share(plan, work.batch)
    cache = plan.cache_bytes(rank, work.context, sequences)
    return StepTime(
        weights=read / device.memory_bandwidth_bytes_per_second,
        cache=cache / device.memory_bandwidth_bytes_per_second,
        compute=_products(plan, topology, traffic, sequences, work.batch),
        communication=_communication(plan, topology, sequences),
        launch=_kernels(plan) * device.launch_seconds,
    )


def _prefill(plan: Plan, topology: Topology, work: Workload, traffic: Traffic, rank: int, sequences: int) -> StepTime:
    device = topology.device
    tokens = sequences * work.prompt
    steps = -(-tokens // work.chunk)
    read = traffic.dense_bytes + traffic.expert_bytes * touched_share(plan, tokens * plan.layout.attn_dp)
    attention = sequences * _attention_operations(plan, rank, work.prompt) / device.flops_16bit
    return StepTime(
        weights=steps * read / device.memory_bandwidth_bytes_per_second,
        cache=plan.cache_bytes(rank, work.prompt, sequences) / device.memory_bandwidth_bytes_per_second,
        compute=_products(plan, topology, traffic, tokens, tokens * plan.layout.attn_dp) + attention,
        communication=steps * _communication(plan, topology, -(-tokens // steps)),
        launch=steps * _kernels(plan) * device.launch_seconds,
    )


def _products(plan: Plan, topology: Topology, traffic: Traffic, tokens: int, all_tokens: int) -> float:
    """Seconds of the matrix products: own tokens through dense weights, everybody's through this rank's experts."""
    rate = topology.device.flops_8bit if traffic.eight_bit else topology.device.flops_16bit
    experts = traffic.expert_parameters * _chosen_share(plan) * all_tokens
    return 2 * (traffic.dense_parameters * tokens + experts) / rate


def _moe(plan: Plan) -> Moe | None:
    return next((f for layer, _ in plan.model.layer_groups() for f in layer.feed_forward if isinstance(f, Moe)), None)


def _chosen_share(plan: Plan) -> float:
    moe = _moe(plan)
    return moe.routing.top_k / moe.expert_axis.units if moe else 0.0


def touched_share(plan: Plan, tokens: int) -> float:
    """Expected share of a rank's routed experts that `tokens` independent tokens choose."""
    return 1.0 - (1.0 - _chosen_share(plan)) ** tokens


def _attention_operations(plan: Plan, rank: int, prompt: int) -> float:
    """Scores and weighted sums of one causal prompt on this rank."""
    at = plan.layout.coordinates(rank)
    total = 0.0
    for layer, numbers in plan.model.layer_groups():
        for mixer in layer.mixers:
            if isinstance(mixer, Mamba2 | GatedDelta) or not hasattr(mixer, "q_axis"):
                continue
            width = {
                Attention: lambda m: m.head_dim + m.v_head_dim,
                MlaAttention: lambda m: m.nope_dim + m.rope_dim + m.v_head_dim,
            }.get(type(mixer), lambda m: 2 * m.head_dim)(mixer)
            seen = min(prompt / 2, getattr(mixer, "window", None) or prompt)
            total += len(numbers) * 2 * plan.cuts.share(mixer.q_axis, at).length * width * prompt * seen
    return total


def _kernels(plan: Plan) -> int:
    return KERNELS_PER_STEP + sum(
        len(numbers)
        * (
            len(layer.mixers) * KERNELS_PER_MIXER
            + sum(KERNELS_PER_MOE if isinstance(f, Moe) else KERNELS_PER_DENSE for f in layer.feed_forward)
        )
        for layer, numbers in plan.model.layer_groups()
    )


def _communication(plan: Plan, topology: Topology, tokens: int) -> float:
    return sum(c.count * collective_seconds(c, plan, topology, tokens) for c in plan.collectives)


def collective_seconds(collective: Collective, plan: Plan, topology: Topology, tokens: int) -> float:
    """Latency plus the bytes that cross one rank's link, for `tokens` tokens of one data-parallel rank."""
    layout = plan.layout
    size = layout.world if collective.axis == "world" else getattr(layout, collective.axis)
    if size == 1:
        return 0.0
    strides: dict[str, int] = {MeshAxis.MOE_TP: layout.moe_ep, MeshAxis.ATTN_DP: layout.tp}
    stride = strides.get(collective.axis, 1)
    link = topology.link(size * stride)
    payload = collective.bytes_per_token * tokens
    crossing = payload * (size - 1) / size * (2 if collective.op == "all_reduce" else 1)
    if collective.axis in ("world", MeshAxis.ATTN_DP) and collective.op != "all_reduce":
        crossing *= layout.attn_dp  # tokens of all groups
    return link.latency_seconds + crossing / link.bandwidth_bytes_per_second
