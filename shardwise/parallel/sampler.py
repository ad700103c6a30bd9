"""From logits to the next token: greedy, or temperature with top-k and top-p."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is continued. ValueError for values outside of their range."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0: greedy, the other sampling options are ignored."""
    top_p: float = 1.0
    """Keep the most likely tokens whose probabilities sum to this."""
    top_k: int = 0
    """Keep this many most likely tokens; 0: all."""
    seed: int | None = None
    """None: a seed that the first rank draws. Equal seeds give equal tokens, whatever else is in the batch."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end the answer, besides the model's own."""
    ignore_eos: bool = False
    """Go on behind the model's own stop ids (for benchmarks)."""

    def __post_init__(self):
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for name, value, legal, fits in (
            ("max_new_tokens", self.max_new_tokens, "at least 1", self.max_new_tokens >= 1),
            ("temperature", self.temperature, "at least 0", self.temperature >= 0),
            ("top_p", self.top_p, "above 0 and at most 1", 0 < self.top_p <= 1),
            ("top_k", self.top_k, "at least 0", self.top_k >= 0),
            ("stop", self.stop, "texts that are not empty", all(self.stop)),
        ):
            if not fits:
                raise ValueError(f"{name} is {value!r}, legal: {legal}")


def sample(logits: "Tensor", params: SamplingParams, generator: "Generator | None") -> int:
    """The next token of one request. logits float32 [V], equal on all ranks; so is the generator's state."""
    if params.temperature == 0:
        return int(logits.argmax())
    import torch

    values, ids = torch.topk(logits / params.temperature, params.top_k or logits.shape[-1])
    chances = values.softmax(-1)
    if params.top_p < 1:
        before = chances.cumsum(-1) - chances
        chances = chances.masked_fill(before >= params.top_p, 0.0)
    return int(ids[torch.multinomial(chances, 1, generator=generator)])
