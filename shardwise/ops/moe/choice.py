"""Which experts a token goes to, from its router's logits, in one launch: any of the scores that models use.

Not a registered operator: the runtime calls it directly. Softmax over all experts or a sigmoid of each; a correction
that counts for the choice alone; groups of experts of which the best stay (DeepSeek-V2, arXiv:2405.04434, ranks groups
by their best score, DeepSeek-V3, arXiv:2412.19437, by the sum of their two best). CUDA, or Triton's interpreter.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.ops.kernel_launch import Kernel
from shardwise.ops.triton_support import await_predecessor, dependent_launch, tl, triton

MOST_EXPERTS = 1024
SCORES = ("softmax", "sigmoid")


@dataclass(frozen=True)
class Choice:
    """How experts are chosen and weighted."""

    top_k: int
    score: str = "softmax"
    normalize: bool = True
    """Weights are divided by their sum."""
    groups: int = 1
    top_groups: int = 1
    by_two: bool = False
    """A group counts as much as the sum of its two best scores; else as its best."""
    scale: float = 1.0


def choose_experts(
    logits: Tensor,  # [T, E]
    slots: Tensor,  # int64 [E]: local slot of each expert, -1 for those of others
    choice: Choice,
    correction: Tensor | None = None,  # float32 [E]
) -> tuple[Tensor, Tensor]:
    """Slots int32 and weights float32, both [T, K], best expert first, lowest number first among equals."""
    tokens, experts = logits.shape
    if experts > MOST_EXPERTS or choice.score not in SCORES or experts % choice.groups:
        raise ValueError(
            f"choose_experts: {experts} experts in {choice.groups} groups by {choice.score}; legal: up to "
            f"{MOST_EXPERTS}, in even groups, by {' or '.join(SCORES)}"
        )
    ids = torch.empty(tokens, choice.top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(tokens, choice.top_k, dtype=torch.float32, device=logits.device)
    pdl = dependent_launch(logits.device)
    fixed = (
        experts, choice.top_k, triton.next_power_of_2(choice.top_k), triton.next_power_of_2(max(32, experts)),
        choice.groups, choice.top_groups, choice.by_two, choice.score == "sigmoid", correction is not None,
        choice.normalize, pdl,
    )  # fmt: skip
    pointers = (logits.contiguous(), slots if correction is None else correction, slots, ids, weights)
    _KERNEL(logits.device, (tokens, 1, 1), pointers, (choice.scale,), fixed, warps=1, pdl=pdl)
    return ids, weights


@triton.jit
def _best(values, number, least: tl.constexpr):
    """The largest value and the lowest number that has it."""
    best = tl.max(values, 0)
    return best, tl.min(tl.where(values == best, number, least), 0)


@triton.jit
def _group_scores(choice, e, group, GROUPS: tl.constexpr, BLOCK: tl.constexpr, BY_TWO: tl.constexpr):
    """For each expert the score of its group."""
    found = choice
    for number in tl.static_range(GROUPS):
        inside = tl.where(group == number, choice, float("-inf"))
        score, place = _best(inside, e, BLOCK)
        if BY_TWO:
            score += tl.max(tl.where(e == place, float("-inf"), inside), 0)
        found = tl.where(group == number, score, found)
    return found


@triton.jit(do_not_specialize=["scale"])
def choose_kernel(
    logit_ptr, correction_ptr, slot_ptr, id_ptr, weight_ptr, scale,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, K_BLOCK: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr, BY_TWO: tl.constexpr, SIGMOID: tl.constexpr, CORRECTED: tl.constexpr,
    NORMALIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token."""
    token = tl.program_id(0)
    e = tl.arange(0, BLOCK)
    exists = e < EXPERTS
    slots = tl.load(slot_ptr + e, mask=exists, other=-1).to(tl.int32)
    await_predecessor(PDL)
    logits = tl.load(logit_ptr + token * EXPERTS + e, mask=exists, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        powers = tl.exp(logits - tl.max(logits, 0))
        scores = powers / tl.sum(powers, 0)
    choice = scores
    if CORRECTED:
        choice += tl.load(correction_ptr + e, mask=exists, other=0.0)
    choice = tl.where(exists, choice, float("-inf"))
    if GROUPS > 1:
        group = e // (EXPERTS // GROUPS)
        ranks = _group_scores(choice, e, group, GROUPS, BLOCK, BY_TWO)
        ranks = tl.where(exists, ranks, float("-inf"))
        kept = e < 0
        for _ in tl.static_range(TOP_GROUPS):
            _, number = _best(ranks, group, BLOCK)
            kept = kept | (group == number)
            ranks = tl.where(group == number, float("-inf"), ranks)
        choice = tl.where(kept & exists, choice, float("-inf"))
    k = tl.arange(0, K_BLOCK)
    ids = k * 0 - 1
    weights = k * 0.0
    for number in tl.static_range(TOP_K):
        _, place = _best(choice, e, BLOCK)
        here = e == place
        ids = tl.where(k == number, tl.sum(tl.where(here, slots, 0), 0), ids)
        weights = tl.where(k == number, tl.sum(tl.where(here, scores, 0.0), 0), weights)
        choice = tl.where(here, float("-inf"), choice)
    if NORMALIZE:
        weights = weights / (tl.sum(weights, 0) + 1e-20)
    tl.store(id_ptr + token * TOP_K + k, ids, mask=k < TOP_K)
    tl.store(weight_ptr + token * TOP_K + k, weights * scale, mask=k < TOP_K)


_KERNEL = Kernel(choose_kernel)
