"""`shardwise run MODEL`: a model split over several ranks answers prompts.

Starts the ranks itself, or runs inside a rank that torchrun or mpirun started; then every rank makes the same calls
and rank 0 speaks.
"""

import argparse
import json
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shardwise.launch import env
from shardwise.launch.cli import DONE, UsageError, file_of
from shardwise.launch.cli.grid import add_forms, add_grid, model_config, set_log_folder
from shardwise.launch.cli.output import add_json, require_writable, write_json
from shardwise.launch.interrupt import interruptible

if TYPE_CHECKING:
    from shardwise.launch.llm import LLM
    from shardwise.launch.model_config import ModelConfig
    from shardwise.parallel.prompts import Prompt
    from shardwise.parallel.results import TokenEvent
    from shardwise.parallel.sampler import SamplingParams

DEFAULT_PROMPT = "Name three primary colors."
SHORT = 1024
"""Bytes of a prompt that fits every model, so that no tokenizer need be read to know."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a known name (smollm2), GGUF file, model folder or hub id")
    add_grid(parser)
    text = parser.add_argument_group("prompts and answers")
    source = text.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help=f"default: {DEFAULT_PROMPT}")
    source.add_argument("--prompts", metavar="FILE", help="one prompt a line, or a JSON list of texts; - is stdin")
    text.add_argument("--raw", action="store_true", help="do not wrap prompts in the model's chat template")
    text.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")
    text.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): greedy")
    text.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="sample from the most likely tokens that sum to P"
    )
    text.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="sample from the K most likely tokens (default: all)"
    )
    text.add_argument("--seed", type=int, metavar="S", help="of sampling (default: a new one)")
    text.add_argument("--stop", action="append", default=[], metavar="TEXT", help="text that ends an answer")
    text.add_argument("--ignore-eos", action="store_true", help="do not stop at the model's own end-of-text tokens")
    add_forms(text)
    text.add_argument("--trace", metavar="DIR", help="write a Chrome trace of each rank's first steps there")
    add_json(text)


def run(args: argparse.Namespace) -> int:
    """0; errors come out as exceptions. Nothing of torch is imported unless this process is itself a rank."""
    from shardwise.launch.model_config import within

    info = env.detect()
    params = _sampling(args)
    config = replace(model_config(args, info, args.model), request_tokens=1 + params.max_new_tokens)
    texts = _prompts(args)
    require_writable(args.json)
    set_log_folder(args.log_dir)
    if within(info):
        from shardwise.launch.worker import run_here

        run_here(info, lambda: _generate(args, config, params, texts, speaks=info.rank == 0), debug=args.debug)
    with interruptible():
        _generate(args, config, params, texts, speaks=True)
    return DONE


def _generate(
    args: argparse.Namespace, config: "ModelConfig", params: "SamplingParams", texts: list[str], *, speaks: bool
) -> None:
    from shardwise.launch.llm import LLM
    from shardwise.launch.progress import LoadProgress

    prompts = _checked_prompts(config, texts, args.raw, params.max_new_tokens)
    with LoadProgress(sys.stderr, enabled=speaks) as progress:
        llm = LLM(
            config.model,
            launcher=args.launcher,
            ray_address=args.ray_address,
            on_progress=progress.update,
            debug=args.debug,
            **config.options,
        )
    with llm:
        screen = _Screen(texts) if speaks and args.json != "-" else None
        with screen or nullcontext():
            for event in llm.stream(prompts, params):
                if screen is not None:
                    screen.add(event)
        result = _result(llm)
        if screen is not None:
            _show_figures(llm)
        if speaks:
            write_json(result, args.json)


def _checked_prompts(config: "ModelConfig", texts: list[str], raw: bool, new: int) -> "list[Prompt]":
    """The prompts of these texts. ValueError, before any rank starts, for one that the model's chat template refuses,
    or that its context or the cache cannot hold."""
    from shardwise.launch.model_config import checkpoint_of, plan_of
    from shardwise.parallel.chat import render_chat
    from shardwise.parallel.prompts import PromptLimits, checked, encode_fitting
    from shardwise.parallel.supported import context
    from shardwise.parallel.tokenizer import chat_template, load_tokenizer
    from shardwise.sharding.checkpoint.resolve import has_tokenizer

    model, checkpoint = plan_of(config).model, checkpoint_of(config)
    chats = [[{"role": "user", "content": text}] for text in texts]
    prompts = [checked(number, prompt) for number, prompt in enumerate(texts if raw else chats)]
    short = all(0 < len(text.encode()) <= SHORT for text in texts)
    if config.cache_tokens is not None or not short or not has_tokenizer(checkpoint.path):
        limits = PromptLimits(model.vocab, context(model), config.cache_tokens)
        encode_fitting(prompts, [new] * len(prompts), load_tokenizer(checkpoint), limits)
    elif not raw:
        template = chat_template(checkpoint)
        for chat in chats:
            render_chat(template, chat, bos_token="", eos_token="")
    return prompts


def _result(llm: "LLM") -> dict:
    """The JSON object: of one prompt's answer, or of a list of answers under `completions`."""
    answer, stats = llm.last_answer, llm.stats()
    assert answer is not None
    each = [
        {
            "text": completion.text,
            "token_ids": list(completion.token_ids),
            "prompt_tokens": completion.prompt_tokens,
            "new_tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
        }
        for completion in answer.completions
    ]
    head = each[0] if len(each) == 1 else {"completions": each}
    return {
        **head,
        "tokens_per_second": answer.tokens_per_second,
        "time_to_first_token_seconds": answer.time_to_first_token,
        "seconds": answer.seconds,
        "ranks": [asdict(rank) for rank in stats],
        "launcher": llm.launcher,
        "transport": llm.transport,
        "model": llm.config.model,
        "layout": llm.config.layout,
    }


class _Screen:
    """Shows answers as they are produced, in the order of the prompts: the later ones are held until their turn."""

    def __init__(self, prompts: list[str]):
        self._heads = [f"> {prompt}\n" for prompt in prompts] if len(prompts) > 1 else [""]
        self._held = list(self._heads)
        self._ended = [False] * len(self._heads)
        self._turn = 0
        self._inside_line = False

    def __enter__(self) -> "_Screen":
        return self

    def __exit__(self, *error: object) -> None:
        """What is said of an answer that broke off begins a line."""
        if self._inside_line:
            print(flush=True)

    def add(self, event: "TokenEvent") -> None:
        number = event.request
        self._held[number] += event.text
        if event.finish_reason is not None:
            self._ended[number] = True
            self._held[number] += "\n\n" if self._heads[number] else "\n"
        while self._turn < len(self._held):
            shown, self._held[self._turn] = self._held[self._turn], ""
            print(shown, end="", flush=True)
            if shown:
                self._inside_line = not shown.endswith("\n")
            if not self._ended[self._turn]:
                break
            self._turn += 1


def _show_figures(llm: "LLM") -> None:
    answer = llm.last_answer
    assert answer is not None
    weights = llm.stats()[0].weights
    if "dequantised" in weights or "left out" in weights:
        print(f"weights of rank 0: {weights}", file=sys.stderr)
    peaks = ", ".join(f"{rank.peak_rss_bytes / 2**20:.0f}" for rank in llm.stats())
    world = llm.config.world
    ranks = f"{llm.transport}, {world} ranks" if world > 1 else "1 rank"
    print(
        f"{answer.new_tokens} tokens, {answer.tokens_per_second:.1f} tokens/s, first token after "
        f"{answer.time_to_first_token:.2f} s, peak memory a rank {peaks} MiB "
        f"({llm.launcher}, {ranks})",
        file=sys.stderr,
    )
    if llm.config.trace:
        print(f"traces of the first steps, which recording slowed down: {llm.config.trace}", file=sys.stderr)


def _sampling(args: argparse.Namespace) -> "SamplingParams":
    from shardwise.parallel.sampler import SamplingParams

    names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop", "ignore_eos")
    try:
        return SamplingParams(**{name: getattr(args, name) for name in names})
    except ValueError as error:
        raise UsageError(f"--{str(error).replace('_', '-')}") from None


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompts is None:
        return [DEFAULT_PROMPT if args.prompt is None else args.prompt]
    if not args.prompts:
        raise UsageError("--prompts is empty: name a file, or - for standard input")
    if args.prompts == "-" and sys.stdin is None:
        raise ValueError("--prompts - is standard input, which is closed: pipe prompts into it, or name a file")
    with file_of("--prompts"):
        return _read_prompts(args.prompts)


def _read_prompts(source: str) -> list[str]:
    """ValueError for what holds no prompts, OSError for what cannot be read."""
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: is not UTF-8 text: {error.reason} at byte {error.start}") from None
    text = text.removeprefix("\ufeff")  # the mark that editors on Windows begin a file with
    if text.lstrip().startswith("["):
        try:
            prompts = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source}: begins like a JSON list but is not one: {error}") from None
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"{source}: a JSON list of texts is expected")
    else:
        prompts = [line for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"{source}: holds no prompt")
    return prompts
