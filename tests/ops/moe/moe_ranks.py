"""What each rank of a GPU test calls: mixtures whose tokens travel to the ranks of their experts, beside the whole."""

import json
import threading

import torch
from oracles_moe import fp8_stack, nvfp4_stack, relative, routing, stacked

import shardwise.ops  # noqa: F401 - registers the operators
from shardwise.comm.rank import current_groups, use_groups
from shardwise.comm.strategy import create, make_groups
from shardwise.partition import extent
from shardwise.sharding.layout import ParallelLayout

OPS = torch.ops.auto_deploy
EXPERTS, TOP_K, HIDDEN, SIZE, LIMIT = 7, 3, 256, 384, 160
TOKENS = {2: ((3, 150), (0, 40)), 3: ((2, 0, 70),)}
"""Tokens of each rank, by the number of ranks."""
_DRAWING = threading.Lock()
"""Threads share the random generator."""


def layout(ranks):
    return ParallelLayout(tp=1, attn_dp=ranks, moe_tp=1, moe_ep=ranks)


def mapping(ranks):
    return json.dumps({"enable_attention_dp": True, "moe_ep_size": ranks, "num_experts": EXPERTS})


def operators(device):
    """{name: call(x, ids, weights, experts, *tail)} of every operator that exchanges tokens, on the same weights."""
    first, second = stacked(EXPERTS, HIDDEN, SIZE, True, device, torch.bfloat16)
    (q1, s1, _), (q2, s2, _) = fp8_stack(first), fp8_stack(second)
    (c1, b1, g1, _), (c2, b2, g2, _) = nvfp4_stack(first), nvfp4_stack(second)
    s_in, s_hidden = torch.full((1,), 5 / 448, device=device), torch.full((1,), 8 / 448, device=device)
    g, (up, gate) = torch.tensor(600.0, device=device), first.chunk(2, 1)
    stacks = {
        "torch_moe": lambda e: ([*gate[e]], [*second[e]], [*up[e]]),
        "triton_moe_fused": lambda e: (first[e], second[e]),
        "trtllm_moe_fused": lambda e: (first[e], second[e]),
        "triton_quant_fp8_moe": lambda e: (
            (q1[e], q2[e], q1[e]) + (s_in, s_hidden, s_in) + (s1[e], s2[e], s1[e])
        ),
        "trtllm_quant_fp8_moe_fused": lambda e: (q1[e], q2[e], s_in, s1[e] * s_in, 1 / s_hidden, s2[e] * s_hidden),
        "trtllm_quant_nvfp4_moe_fused": lambda e: (
            (c1[e], c2[e], b1[e], b2[e]) + (g, g) + (1 / (g * g1[e]), 1 / (g * g2[e]))
        ),
    }  # fmt: skip

    def call(name):
        return lambda x, ids, weights, experts, *tail: getattr(OPS, name)(
            x, ids, weights, *stacks[name](experts), True, 4, *tail
        )

    return {name: call(name) for name in stacks}


def draw(device, counts):
    """What all ranks agree on: the operators, and (x, ids, weights) of each rank for every tuple of `counts`."""
    with _DRAWING:
        torch.manual_seed(3)
        calls = operators(device)
        inputs = [
            [(torch.randn(n, HIDDEN, device=device).bfloat16(), *routing(n, TOP_K, EXPERTS, device)) for n in tokens]
            for tokens in counts
        ]
    for _, ids, _ in sum(inputs, []):
        ids[:, 0].clamp_(0, EXPERTS - 1)
    return calls, inputs


def travel(device):
    """Errors by (operator, tokens of the ranks, max_num_tokens) of this rank's tokens; the current groups' body."""
    group, errors = current_groups().moe_ep, {}
    mine, counts = slice(*extent(EXPERTS, group.size, group.rank)), TOKENS[group.size]
    calls, inputs = draw(device, counts)
    for tokens, of_ranks in zip(counts, inputs, strict=True):
        for name, call in calls.items():
            whole = call(*of_ranks[group.rank], slice(None))
            for limit in (LIMIT,) if name.startswith("trtllm") else (0, LIMIT):
                got = call(*of_ranks[group.rank], mine, mapping(group.size), limit)
                assert got.shape == whole.shape and got.dtype == whole.dtype
                errors[name, tokens, limit] = relative(got, whole) if len(whole) else 0.0
    return errors


def travel_in_a_graph():
    """Error of a captured call after its inputs changed."""
    group = current_groups().moe_ep
    calls, inputs = draw("cuda", ((5,) * group.size,))
    call, mine = calls["triton_moe_fused"], slice(*extent(EXPERTS, group.size, group.rank))
    x, ids, weights = inputs[0][group.rank]
    tail = mapping(group.size), 8
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call(x, ids, weights, mine, *tail)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = call(x, ids, weights, mine, *tail)
    x.copy_(torch.randn(x.shape, device="cuda") + group.rank)
    ids[:, 0] = (torch.arange(5, device="cuda") + group.rank) % EXPERTS
    out.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    return relative(out, call(x, ids, weights, slice(None)))


def travel_as_process(info, store, transport):
    """(errors of `travel`, error of `travel_in_a_graph`) on this rank's own GPU."""
    torch.cuda.set_device(info.local_rank)
    world = create(info, transport=transport, device="cuda", store=store)
    with use_groups(make_groups(world, layout(info.world))):
        found = travel(f"cuda:{info.local_rank}"), travel_in_a_graph()
    world.barrier()
    world.close()
    return found
