"""Which model the ranks load, and how: the one description that `LLM`, `run` and `bench generate` make and ranks get.

An option is a field of `ModelConfig` and a line of `ModelOptions`. Whoever starts a model hands options on by name.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from shardwise.comm.rank import RankInfo
from shardwise.launch import env
from shardwise.parallel import options
from shardwise.sharding.layout import ParallelLayout

if TYPE_CHECKING:
    from shardwise.sharding.checkpoint.resolve import Checkpoint
    from shardwise.sharding.plan import Plan

UNSET = {"tp": None, "attn_dp": 1, "moe_tp": 0, "ep": 1}
"""Sizes of the grid where nobody asks for one."""
ENGINE = ("dtype", "weights", "cache_tokens", "request_tokens", "decode", "attention")
"""Options that the engine takes under the same names."""


class ModelOptions(TypedDict, total=False):
    """What may be said of a model beside its name; `ModelConfig` has what each means."""

    tp: int | None
    attn_dp: int
    moe_tp: int
    ep: int
    dtype: str
    weights: str
    device: str
    transport: str
    cache_tokens: int | None
    request_tokens: int
    decode: str
    attention: str
    plan: str | None
    trace: str | None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model and its options; JSON values all.

    ValueError for a word or number that no machine would take, so that none starts for it.
    """

    model: str
    tp: int = 1
    attn_dp: int = 1
    moe_tp: int = 0
    ep: int = 1
    dtype: str = "auto"
    weights: str = "auto"
    device: str = "auto"
    """auto: cuda on hosts that have a GPU, else cpu."""
    transport: str = "auto"
    cache_tokens: int | None = None
    """Size of the KV cache in tokens; None: the engine's own choice."""
    request_tokens: int = 1
    """Length of the longest request to come: without memory for its cache the model is refused before it is read."""
    decode: str = "auto"
    """What runs decode steps: auto, graphs, fused or layers."""
    attention: str = "auto"
    """Attention kernels for prompts on a GPU: auto, triton, flashinfer or torch."""
    plan: str | None = None
    """A plan document to replay; its layout then stands in the sizes above."""
    trace: str | None = None
    """Folder for a Chrome trace of each rank's first steps."""
    random_seed: int | None = None
    """Set: weights are random, and `model` may be a config.json of any name."""

    def __post_init__(self) -> None:
        options.require_known("dtype", self.dtype, options.DTYPES)
        options.require_known("weights", self.weights, options.WEIGHT_FORMS)
        options.require_known("device", self.device, options.DEVICES)
        options.require_attention(self.attention, self.device)
        options.require_decode(self.decode, self.device)
        options.require_transport(self.transport, self.device)
        options.require_page(self.cache_tokens, self.device)
        if not isinstance(self.request_tokens, int) or self.request_tokens < 1:
            raise ValueError(f"request_tokens is {self.request_tokens!r}, legal: a whole number of at least 1")

    @property
    def world(self) -> int:
        return self.tp * self.attn_dp

    @property
    def layout(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in UNSET}

    @property
    def options(self) -> ModelOptions:
        """The keyword arguments by which `model_config` gives this config again."""
        return {name: getattr(self, name) for name in ModelOptions.__annotations__}  # type: ignore[return-value]

    @property
    def for_engine(self) -> dict:
        return {name: getattr(self, name) for name in ENGINE}


def model_config(info: RankInfo, launcher: str | None, model: str, **given: Unpack[ModelOptions]) -> ModelConfig:
    """The model as it is run here: sizes from the plan or the launcher's world, folders found and made.

    TypeError for an unknown option and for what is no path; ValueError for a contradiction and for a value that no
    machine takes.
    """
    unknown = [name for name in given if name not in ModelOptions.__annotations__]
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r}; legal: {', '.join(ModelOptions.__annotations__)}")
    if not isinstance(model, str | Path):
        raise TypeError(f"model is {model!r:.60}: give a path or a name")
    rest: dict[str, Any] = dict(given)
    for name in ("plan", "trace"):
        if not isinstance(rest.get(name), str | Path | None):
            raise TypeError(f"{name} is {rest[name]!r}, expected a path")
    if rest.get("transport") == "mpi" and not within(info) and launcher != "mpi":
        raise ValueError("transport mpi needs ranks that mpirun started: name launcher mpi, or leave the transport out")
    if rest.get("trace") is not None:
        rest["trace"] = options.made_folder("trace", rest["trace"])
    sizes = {name: rest.pop(name, unset) for name, unset in UNSET.items()}
    if rest.get("plan") == "":
        raise ValueError("plan is empty: name a file that `shardwise plan --json FILE` wrote")
    if rest.get("plan") is not None:
        sizes = planned_sizes(rest["plan"], **sizes)
        rest["plan"] = str(Path(rest["plan"]).resolve())
    rest |= layout_for(info, **sizes, launcher=launcher)
    return ModelConfig(model=str(model), **rest)


def within(info: RankInfo) -> bool:
    """Whether this process is itself a rank, started by the user's own launcher."""
    return info.source != RankInfo().source


def layout_for(
    info: RankInfo, *, tp: int | None, attn_dp: int, moe_tp: int, ep: int, launcher: str | None = None
) -> dict[str, int]:
    """Sizes of the grid; tp defaults to the launcher's world. ValueError names both sides of a contradiction."""
    for name, size in (("tp", tp), ("attn_dp", attn_dp), ("ep", ep)):
        if (name, size) != ("tp", None) and (not isinstance(size, int) or size < 1):
            raise ValueError(f"{name} {size!r}: must be a whole number of at least 1")
    if within(info) and launcher is not None:
        raise ValueError(
            f"launcher {launcher!r} was asked for, but this process is already rank {info.rank} of {info.world} "
            f"started by {info.source}: drop one of them"
        )
    if within(info):
        if tp is None:
            if info.world % attn_dp:
                raise ValueError(f"attn_dp {attn_dp} does not divide the {info.world} ranks that {info.source} started")
            tp = info.world // attn_dp
        if tp * attn_dp != info.world:
            raise ValueError(
                f"tp {tp} x attn_dp {attn_dp} needs {tp * attn_dp} ranks, but {info.source} started {info.world} "
                f"({env.explain()}): change one of them"
            )
    tp = 1 if tp is None else tp
    ParallelLayout(tp, attn_dp, moe_tp, ep)  # raises for a grid that does not close
    return {"tp": tp, "attn_dp": attn_dp, "moe_tp": moe_tp, "ep": ep}


def planned_sizes(path: str | Path, **given: int | None) -> dict[str, int]:
    """Sizes of a plan file; ValueError where one that was given is another."""
    from shardwise.sharding.replay import layout_in

    layout = layout_in(path)
    sizes = {"tp": layout.tp, "attn_dp": layout.attn_dp, "moe_tp": layout.moe_tp, "ep": layout.moe_ep}
    for name, value in given.items():
        if value not in (UNSET[name], sizes[name]):
            raise ValueError(f"{name} {value} was asked for, but the plan {path} has {sizes[name]}: drop one of them")
    return sizes


def plan_of(config: ModelConfig) -> "Plan":
    """The plan that the ranks run. ValueError for a layout, a plan file or a model that cannot be; needs no torch."""
    from shardwise.parallel.supported import check_supported
    from shardwise.sharding.checkpoint.resolve import require_files
    from shardwise.sharding.cutting import IllegalLayout
    from shardwise.sharding.plan import plan
    from shardwise.sharding.replay import replay

    if config.plan is not None:
        planned = replay(config.plan, config.model)
        _refuse_redundant_experts(planned, config.plan)
    else:
        planned = plan(config.model, ParallelLayout(config.tp, config.attn_dp, config.moe_tp, config.ep))
    check_supported(planned.model)
    if config.ep > 1 and not planned.model.has_experts:
        reason = f"ep {config.ep}: {planned.model.name} has no experts that ranks could share; leave ep out"
        raise IllegalLayout(reason, (reason,))
    if config.random_seed is None:
        require_files(config.model)
    return planned


def checkpoint_of(config: ModelConfig) -> "Checkpoint":
    """Where the weights come from."""
    from shardwise.sharding.checkpoint.resolve import open_checkpoint, random_checkpoint

    if config.random_seed is not None:
        return random_checkpoint(config.model, config.random_seed)
    return open_checkpoint(config.model)


def _refuse_redundant_experts(planned: "Plan", source: str) -> None:
    """Every rank computes all its experts, so an expert on two ranks would count twice."""
    for axis, placement in planned.cuts.placement.items():
        copies = sum(map(len, placement)) - axis.units
        if copies:
            raise ValueError(
                f"{source}: places {copies} redundant experts, which the runtime does not run yet; "
                "make the plan without --redundant-experts"
            )
