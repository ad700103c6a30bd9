"""Which experts a token goes to, and with what weight. Every rank routes all tokens alike."""

import torch
from torch import Tensor

from shardwise.parallel.trace import routed
from shardwise.sharding.spec import Routing


def route(logits: Tensor, routing: Routing, correction: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """logits [T, E] -> expert ids int64 [T, K] and weights float32 [T, K].

    correction [E] is added to the scores for the choice only. Sources: Mixtral (softmax over the chosen),
    gpt-oss (`softmax_after_topk`), DeepSeek-V3 (sigmoid, correction, choice limited to the best groups).
    """
    ids, weights = _choice(logits.float(), routing, correction)
    routed(ids)
    return ids, weights


def _choice(logits: Tensor, routing: Routing, correction: Tensor | None) -> tuple[Tensor, Tensor]:
    if routing.softmax_after_topk:
        values, ids = logits.topk(routing.top_k, dim=-1)
        return ids, values.softmax(-1) * routing.scale
    scores = _SCORES[routing.score](logits)
    choice = scores if correction is None else scores + correction
    if routing.groups > 1:
        choice = _within_best_groups(choice, routing)
    ids = choice.topk(routing.top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    if routing.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * routing.scale if routing.scale != 1.0 else weights


def _within_best_groups(choice: Tensor, routing: Routing) -> Tensor:
    """Scores outside of each token's `top_groups` best groups become the smallest possible."""
    groups = choice.unflatten(-1, (routing.groups, -1))
    if routing.group_score == "max":
        score = groups.amax(-1)
    else:
        score = groups.topk(2, dim=-1).values.sum(-1)
    best = score.topk(routing.top_groups, dim=-1).indices
    outside = torch.ones_like(score, dtype=torch.bool).scatter_(1, best, False)
    return groups.masked_fill(outside[..., None], float("-inf")).flatten(1)


_SCORES = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: torch.nn.functional.softplus(logits).sqrt(),
}
