"""Requests from what a caller passes: encodes and checks prompts, pairs them with sampling parameters and seeds."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from shardwise.comm.base import Communicator
from shardwise.parallel.prompts import Prompt, PromptLimits, encode, require_fit
from shardwise.parallel.sampler import SamplingParams
from shardwise.parallel.scheduler import Request
from shardwise.parallel.text import TextStream
from shardwise.parallel.tokenizer import IdTokenizer, Tokenizer


@dataclass(frozen=True)
class RequestContext:
    """What requests of one engine are made from and checked against."""

    tokenizer: Tokenizer | IdTokenizer
    limits: PromptLimits
    world: Communicator
    """Agrees on the seeds of requests that have none."""
    device: torch.device


def make_requests(
    prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None, context: RequestContext
) -> list[Request]:
    """One request a prompt; `params` for all or one for each.

    TypeError for one text instead of a list. ValueError names the prompt that `require_fit` refuses, and counts that do
    not agree.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts is one text; pass a list of prompts")
    params = SamplingParams() if params is None else params
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts with {len(each)} sampling parameters; give one, or one for each")
    if any(p.temperature > 0 and p.seed is None for p in each):
        drawn = context.world.broadcast_object(secrets.randbits(62))
        each = [replace(p, seed=drawn + i) if p.seed is None else p for i, p in enumerate(each)]
    return [_request(i, prompt, p, context) for i, (prompt, p) in enumerate(zip(prompts, each, strict=True))]


def _request(number: int, prompt: Prompt, params: SamplingParams, context: RequestContext) -> Request:
    ids = encode(prompt, context.tokenizer)
    require_fit(number, ids, params.max_new_tokens, context.limits)
    generator = None
    if params.temperature > 0 and params.seed is not None:
        generator = torch.Generator(context.device).manual_seed(params.seed)
    return Request(number, ids, params, TextStream(context.tokenizer.stream(), params.stop), generator)
