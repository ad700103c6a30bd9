"""`LLM`: a model split over ranks, from a plain script or inside one that torchrun or mpirun started.

    from shardwise import LLM, SamplingParams

    with LLM("smollm2", tp=2) as llm:
        print(llm.generate(["Hello"], SamplingParams(max_new_tokens=32))[0].text)

A plain script starts the ranks itself, as processes of their own (no main guard needed). Under torchrun or mpirun the
script already runs on every rank: each makes the same calls and gets the same results.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Unpack

from shardwise.launch import env
from shardwise.launch.executors import Executor, ParentExecutor, Progress, SpmdExecutor
from shardwise.launch.model_config import ModelOptions, model_config, plan_of, within
from shardwise.launch.session import Answer
from shardwise.launch.start import launcher_options, require_launcher
from shardwise.parallel.results import Completion, RankStats, TokenEvent
from shardwise.parallel.sampler import SamplingParams

if TYPE_CHECKING:
    from shardwise.parallel.prompts import Prompt


class LLM:
    """A running model.

    model       a known name, a GGUF file, a Hugging Face folder or a hub id
    tp          tensor parallel ranks; under torchrun or mpirun it defaults to the world, else to 1
    attn_dp, moe_tp, ep   the other sizes of the grid: tp * attn_dp = world = moe_tp * ep
    launcher    local, torchrun, mpi or ray starts the ranks; inside torchrun or mpirun leave it at None
    dtype       auto (float32 on the CPU, bfloat16 on GPUs), float32, bfloat16, float16
    weights     dequantised, or native: quantised weights stay packed where a layer can compute with them (4- and 8-bit
                integers on the CPU, float8 and MXFP4 experts on GPUs); auto: native on GPUs where possible
    device      auto, cpu or cuda
    cache_tokens   size of the KV cache in tokens; default: sized for each call, on a GPU what the weights leave
    request_tokens length of the longest request to come, prompt and answer: where its cache does not fit beside the
                weights, the model is refused before they are read
    decode      what runs decode steps: graphs (CUDA graphs), fused (the same kernels one by one), layers, or auto
    attention   attention kernels for prompts on a GPU: auto, triton, flashinfer or torch
    transport   one of `shardwise.parallel.options.RUN_TRANSPORTS`
    plan        a file that `shardwise plan --json FILE` wrote: its layout is run, and another checkpoint refused
    trace       a folder for a Chrome trace of each rank's first steps
    on_progress called with (bytes read, bytes to read) of rank 0 while the weights load
    debug       tracebacks in the report of a failure
    Raises TypeError for an unknown option, ValueError for an illegal value and for a layout that does not fit the model
    or the launcher's world, FileNotFoundError for a missing model, JobFailed when a rank fails.
    """

    def __init__(
        self,
        model: str,
        *,
        launcher: str | None = None,
        ray_address: str | None = None,
        on_progress: Progress | None = None,
        debug: bool = False,
        **options: Unpack[ModelOptions],
    ):
        require_launcher(launcher, ray_address)
        if not callable(on_progress) and on_progress is not None:
            raise TypeError(f"on_progress is {on_progress!r:.60}, expected a function of bytes read and bytes to read")
        info = env.detect()
        self.config = model_config(info, launcher, model, **options)
        self.launcher = launcher or (info.source if within(info) else "local")
        if within(info):
            self._executor: Executor = SpmdExecutor(self.config, info, on_progress)
        else:
            planned = plan_of(self.config).model  # errors come up before any rank starts
            about = launcher_options(self.launcher, ray_address, self.config.device)
            self._executor = ParentExecutor(self.config, planned, self.launcher, about, on_progress, debug)
        self._closer = weakref.finalize(self, self._executor.close)
        self._closer.atexit = False  # executors know better when to close at the end
        self.last_answer: Answer | None = None
        """Times of the last call that was read to its end."""

    @property
    def transport(self) -> str:
        """What moves the bytes between the ranks: gloo, nccl, mpi, shm, p2p, …"""
        return self._executor.transport

    def generate(
        self, prompts: "Sequence[Prompt] | str", params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Completions in the order of the prompts. A prompt is raw text, token ids, or a list of chat messages.

        TypeError for what is not a prompt or not SamplingParams, ValueError for a prompt that does not fit context or
        cache, or that the chat template refuses.
        """
        answers = [item for item in self._items(prompts, params) if isinstance(item, Answer)]
        return list(answers[0].completions)

    def stream(
        self, prompts: "Sequence[Prompt] | str", params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[TokenEvent]:
        """Tokens of all prompts as they come; arguments and errors as for `generate`.

        The ranks serve one call after the other. A stream that rests goes on in them: the next call, of this or of
        another thread, waits for its end and keeps its tokens, so that it can be read on. One that is closed, as by
        `break` in a loop over it, ends in them within a moment, and so does a call that an exception interrupts.
        """
        for item in self._items(prompts, params):
            if isinstance(item, TokenEvent):
                yield item

    def _items(
        self, prompts: "Sequence[Prompt] | str", params: SamplingParams | Sequence[SamplingParams] | None
    ) -> Iterator[TokenEvent | Answer]:
        from shardwise.parallel.prompts import checked

        if not isinstance(prompts, Iterable):
            raise TypeError(f"prompts is {prompts!r:.60}: give a list of prompts")
        single = isinstance(prompts, str | bytes | Mapping)
        listed = [checked(i, prompt) for i, prompt in enumerate([prompts] if single else prompts)]
        each = _one_each(params, len(listed))
        if not self._closer.alive:
            raise RuntimeError("this LLM is closed")
        for item in self._executor.stream(listed, each):
            if isinstance(item, Answer):
                self.last_answer = item
            yield item

    def stats(self) -> list[RankStats]:
        """Bytes and peak memory of every rank, in order: after the last call that was read to its end, or loading."""
        return self._executor.stats()

    def close(self) -> None:
        """End the ranks and free what they hold; idempotent."""
        self._closer()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._executor.abort()
        self.close()


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    legal = "give SamplingParams(...), or a list with one for each prompt"
    if not isinstance(params, Iterable):
        raise TypeError(f"params is {params!r:.60}: {legal}")
    each = list(params)
    wrong = [one for one in each if not isinstance(one, SamplingParams)]
    if wrong:
        raise TypeError(f"params has {wrong[0]!r:.60}: {legal}")
    if len(each) != count:
        raise ValueError(f"{count} prompts with {len(each)} sampling parameters; give one, or one for each")
    return each
