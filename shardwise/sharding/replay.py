"""Makes the plan of a plan document again, and refuses a model that is not the one it was made for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardwise.sharding.config import Config, ConfigError
from shardwise.sharding.document import plan_hash
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.model import ModelSpec
from shardwise.sharding.plan import Plan, plan
from shardwise.sharding.plan_file import read_document


class OtherModel(ConfigError):
    """A plan document was made for another model; `exit_code` is the job's."""

    exit_code = 2


def replay(path: str | Path, model: ModelSpec | Mapping[str, Any] | str | Path) -> Plan:
    """The plan in the file `path`, for `model`.

    ConfigError when the file is not a plan document, OtherModel when config, tensors or cuts of `model` give another
    hash.
    """
    document = read_document(path)
    fields = Config(document, str(path))
    layout, options = _layout(fields), fields.own("options")
    made = plan(
        model,
        layout,
        pad=options.list("pad", default=[], of=str),
        extras=options.list("extras", default=[], of=str),
        kv_itemsize=options.integer("kv_itemsize", default=2),
        expert_placement=_placement(document, layout, str(path)),
    )
    found, wanted = plan_hash(made), fields.text("hash")
    if found != wanted:
        name = fields.own("model").text("name", default="its model")
        raise OtherModel(
            f"{path}: made for {name} with hash {wanted}, but {made.model.name} gives {found}: config, tensors or cuts "
            "differ; make a new plan, or use the model that this one was made for"
        )
    return made


def layout_in(path: str | Path) -> ParallelLayout:
    """The layout of the plan document `path`; ConfigError when it is none."""
    return _layout(Config(read_document(path), str(path)))


def _layout(fields: Config) -> ParallelLayout:
    sizes = fields.own("layout")
    return ParallelLayout(
        sizes.integer("tp"), sizes.integer("attn_dp"), sizes.integer("moe_tp"), sizes.integer("moe_ep")
    )


def _placement(document: Mapping[str, Any], layout: ParallelLayout, source: str) -> tuple[tuple[int, ...], ...] | None:
    """Experts of each moe_ep coordinate, from the ranks that stand there; None without experts."""
    held: dict[int, tuple[int, ...]] = {}
    for rank, row in enumerate(document["ranks"]):
        if rank >= layout.world:
            raise ConfigError(f"{source}: ranks[{rank}] does not belong to a layout of {layout.world} ranks")
        if row["experts"]:
            held[layout.coordinates(rank).moe_ep] = tuple(row["experts"][0])
    if not held:
        return None
    if sorted(held) != list(range(layout.moe_ep)):
        raise ConfigError(f"{source}: ranks list the experts of {sorted(held)}, the layout has moe_ep {layout.moe_ep}")
    return tuple(held[i] for i in range(layout.moe_ep))
