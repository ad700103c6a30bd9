"""From logits to the next token: greedy, or temperature with top-k and top-p."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Generator, Tensor

SEEDS = range(-(2**63), 2**64)
"""What torch's generators take."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is continued: length, sampling, when to stop. ValueError for a value outside of its range."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0: greedy decoding; top_p, top_k and seed are then ignored."""
    top_p: float = 1.0
    """Sample from the most likely tokens whose probabilities sum to this."""
    top_k: int = 0
    """Sample from this many most likely tokens; 0: all."""
    seed: int | None = None
    """None: rank 0 draws one. Equal seeds give equal tokens, whatever else is in the batch."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end the answer, besides the model's own."""
    ignore_eos: bool = False
    """Do not stop at the model's own end-of-text ids (for benchmarks)."""

    def __post_init__(self):
        for field in fields(self):
            given = _plain(getattr(self, field.name))
            one_text = field.name == "stop" and isinstance(given, str)
            object.__setattr__(self, field.name, (given,) if one_text else given)
        for name, kind, legal, fits in (
            ("max_new_tokens", int, "a whole number of at least 1", lambda n: n >= 1),
            ("temperature", Real, "a number of at least 0", lambda t: t >= 0),
            ("top_p", Real, "a number above 0 and at most 1", lambda p: 0 < p <= 1),
            ("top_k", int, "a whole number of at least 0", lambda k: k >= 0),
            ("seed", int | None, "from -2**63 to 2**64 - 1", lambda s: s is None or s in SEEDS),
            ("stop", tuple, "texts that are not empty", lambda texts: all(isinstance(t, str) and t for t in texts)),
            ("stop_token_ids", tuple, "a list of whole numbers", lambda ids: all(isinstance(i, int) for i in ids)),
            ("ignore_eos", bool, "True or False", lambda given: True),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind) or not fits(value):
                raise ValueError(f"{name} is {value!r}, legal: {legal}")


def _plain(given: Any) -> Any:
    """Python's own number for one of NumPy's, which JSON does not take; lists as tuples; a text as itself."""
    if isinstance(given, Integral) and not isinstance(given, bool):
        return int(given)
    if isinstance(given, Real) and not isinstance(given, int):
        return float(given)
    return tuple(map(_plain, given)) if isinstance(given, Iterable) and not isinstance(given, str) else given


def sample(logits: "Tensor", params: SamplingParams, generator: "Generator | None") -> int:
    """The next token of one request. logits float32 [V], equal on all ranks; so is the generator's state."""
    if params.temperature == 0:
        return int(logits.argmax())
    import torch

    values, ids = torch.topk(logits, min(params.top_k or len(logits), len(logits)))
    # From the largest, so that no quotient overflows; what float32 rounds to 0 divides by the least above it.
    chances = ((values - values[0]) / max(params.temperature, torch.finfo(torch.float32).tiny)).softmax(-1)
    if params.top_p < 1:
        before = chances.cumsum(-1) - chances
        chances = chances.masked_fill(before >= params.top_p, 0.0)
    return int(ids[torch.multinomial(chances, 1, generator=generator)])
