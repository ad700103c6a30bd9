"""Multi-token-prediction layers: part of many checkpoints, loaded only when asked for."""

from collections.abc import Iterable

from shardwise.sharding.axes import fixed
from shardwise.sharding.builder import Builder
from shardwise.sharding.config import Config
from shardwise.sharding.model import Extra, Layer
from shardwise.sharding.tensors import TensorSpec

MTP_NAMES = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
"""Norm of the embedding, norm of the hidden state, projection of both, norm before the head (DeepSeek's names)."""


def mtp_layers(
    b: Builder,
    config: Config,
    like: Layer,
    module: str,
    *,
    first: int = 0,
    base: str | None = None,
    names: Iterable[str] = MTP_NAMES,
    more: tuple[TensorSpec, ...] = (),
) -> None:
    """Adds MTP layers to the builder's extras: a decoder layer `like`, two norms, a projection and a norm.

    `module` is the prefix of the tensors of `like`, `base` the prefix that they have in the MTP part; `first` is the
    number of the first MTP layer there.
    """
    count = config.integer("num_nextn_predict_layers", default=0, least=0)
    if not count:
        return
    base = base or module
    enorm, hnorm, project, last = names
    moved = tuple(replace_prefix(t, module, base) for t in like.tensors)
    own = (
        b.vector("mtp.embed_norm.weight", f"{base}.{enorm}.weight", b.hidden),
        b.vector("mtp.hidden_norm.weight", f"{base}.{hnorm}.weight", b.hidden),
        b.vector("mtp.project.weight", f"{base}.{project}.weight", b.hidden, fixed(2 * b.hidden_size)),
        b.vector("mtp.norm.weight", f"{base}.{last}.weight", b.hidden),
    )
    layers = tuple(range(first, first + count))
    b.extras.append(Extra(name="mtp", tensors=(*moved, *own, *more), layers=layers, note=f"{count} layers"))


def replace_prefix(tensor: TensorSpec, old: str, new: str) -> TensorSpec:
    """The tensor under another module."""
    from dataclasses import replace

    return replace(tensor, name=new + tensor.name.removeprefix(old))
