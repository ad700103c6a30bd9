"""Plans an architecture that no family file knows, from the names and shapes in the checkpoint's headers.

Linear layers with common names are recognised and cut; everything else stays whole on every rank, and the notes say
what and why. Such a model can be planned and sharded, not run.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from shardwise.sharding.axes import Axis, Dim, LogicalAxis, along, concat, fixed
from shardwise.sharding.checkpoint.header import CheckpointError, TensorEntry
from shardwise.sharding.config import Config
from shardwise.sharding.headers import leftovers, part_of
from shardwise.sharding.model import Layer, ModelSpec
from shardwise.sharding.spec import Attention, Block, DenseMlp, Embedding, Head, Moe, Norm, Routing
from shardwise.sharding.tensors import TensorSpec
from shardwise.sharding.tp_styles import style_of, unmatched

_NUMBER = r"(0|[1-9]\d{0,4})"
"""Of a layer or an expert; no model has as many as a longer one would say, which is then a name like any other."""
_LAYER = re.compile(rf"^(.*?\b(?:layers|layer|blocks|block|h)\.){_NUMBER}(\..*)$")
_EXPERT = re.compile(rf"^(.*\bexperts\.){_NUMBER}(\..*)$")
EMBED = {"embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "embeddings", "embedding"}
HEAD = {"lm_head", "output", "embed_out", "head"}
ROLES = {
    "q": {"q_proj", "wq", "query", "q_lin"},
    "k": {"k_proj", "wk", "key", "k_lin"},
    "v": {"v_proj", "wv", "value", "v_lin"},
    "qkv": {"qkv_proj", "qkv"},
    "o": {"o_proj", "wo", "out_proj", "out_lin"},
    "gate": {"gate_proj", "w1", "wi_0"},
    "up": {"up_proj", "w3", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "wi", "wi_1"},
    "down": {"down_proj", "w2", "fc2", "fc_out", "dense_4h_to_h"},
    "gate_up": {"gate_up_proj"},
}
_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
_GROUP_OF = dict.fromkeys(("q", "k", "v", "qkv", "o"), "attention")
_GROUP_OF |= dict.fromkeys(("gate", "up", "down", "gate_up"), "mlp")
_PAIRS = {
    "attention": ({"q", "k", "v", "o"}, {"qkv", "o"}),
    "mlp": ({"up", "down"}, {"gate_up", "down"}),
}
"""Matrices that must all be there: what one of them cuts, the next must contract."""
SHOWN = 6


@dataclass(frozen=True, slots=True)
class _Stored:
    """One tensor pattern inside a layer."""

    name: str
    module: str
    leaf: str
    shape: tuple[int, ...]
    dtype: str
    experts: int


def model_from_headers(
    config: Config, name: str, tensors: Mapping[str, TensorEntry], styles: Mapping[str, str] | None = None
) -> ModelSpec:
    """A ModelSpec of what the headers show; `config` gives head counts where it has them.

    `styles`: a tp_plan (module globs to styles), which says how modules with uncommon names are cut.
    CheckpointError for experts that are not numbered from 0 on, or differ in shape or type.
    """
    text = config.section("text_config")
    listed = config.list("architectures", default=[], of=str)
    reader = _Reader(text, styles or {})
    layers: dict[int, list[_Stored]] = {}
    ends: list[TensorEntry] = []
    extra = []
    for entry in tensors.values():
        match = _LAYER.match(entry.name)
        if part_of(entry.name) != "other":
            extra.append(entry)
        elif match:
            layers.setdefault(int(match[2]), []).append(_stored(entry, f"{match[1]}{{layer}}{match[3]}"))
        else:
            ends.append(entry)
    made: dict[tuple[_Stored, ...], Layer] = {}
    stack = []
    for number in range(max(layers, default=-1) + 1):
        key = tuple(_fold(layers.get(number, []), config.source))
        stack.append(made.setdefault(key, reader.layer(key)) if key not in made else made[key])
    embed, head, rest = reader.ends(ends)
    names = [s.name for key in made for s in key] + [entry.name for entry in ends]
    vocab = embed[0].shape[0] if embed else text.integer("vocab_size", default=1)
    return ModelSpec(
        name=name,
        architecture=listed[0] if listed else "unknown",
        hidden=reader.hidden or (embed[0].shape[1] if embed else 1),
        vocab=vocab,
        embedding=Embedding(embed, vocab=vocab),
        layers=tuple(stack),
        final_norm=Norm(),
        head=Head(head, tied=not head),
        dtype=Counter(e.dtype for e in tensors.values()).most_common(1)[0][0],
        quantization="as stored",
        extras=leftovers(extra, len(stack)),
        others=(Block(rest),),
        notes=reader.report(listed) + unmatched(styles or {}, names) + _cache_note(stack),
    )


def _cache_note(layers: list[Layer]) -> tuple[str, ...]:
    known = sum(bool(layer.mixers) for layer in layers)
    if known == len(layers):
        return ()
    return (f"cache bytes are those of {known} of {len(layers)} layers, the others are not known",)


def _stored(entry: TensorEntry, name: str) -> _Stored:
    """The pattern of an entry whose layer number is already a placeholder."""
    match = _EXPERT.match(name)
    experts = int(match[2]) + 1 if match else 0
    if match:
        name = f"{match[1]}{{expert}}{match[3]}"
    module, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        module, leaf = name, ""
    return _Stored(name, module.rpartition(".")[2], leaf, entry.shape, entry.dtype, experts)


def _fold(stored: list[_Stored], source: str) -> Iterator[_Stored]:
    """One row a pattern, `experts` being the number of experts that have it."""
    rows: dict[tuple[str, str, str, tuple[int, ...], str], list[int]] = {}
    for s in stored:
        rows.setdefault((s.name, s.module, s.leaf, s.shape, s.dtype), []).append(s.experts)
    for key, numbers in rows.items():
        experts = max(numbers)
        if experts and len(numbers) != experts:
            raise CheckpointError(
                f"{source}: {key[0]} is there {len(numbers)} times as {key[4]} {list(key[3])}, but numbered up to "
                f"{experts - 1}: the experts of a layer must be numbered from 0 on and have one shape and type"
            )
        yield _Stored(*key, experts)


class _Reader:
    """Recognises layers one after another and remembers what it did, for the report."""

    def __init__(self, config: Config, styles: Mapping[str, str]):
        self.config, self.styles = config, styles
        self.hidden = config.integer("hidden_size", "n_embd", "d_model", default=0)
        heads = config.integer("num_attention_heads", "n_head", "num_heads", default=0, least=0)
        kv = config.integer("num_key_value_heads", "num_kv_heads", default=heads, least=0)
        self.head_dim = config.integer("head_dim", default=self.hidden // heads if heads else 0, least=0)
        self.q = LogicalAxis(Axis.Q_HEADS, heads, kv) if heads and kv and heads % kv == 0 else None
        self.kv = LogicalAxis(Axis.KV_HEADS, kv, kv) if self.q else None
        self.cut: Counter[str] = Counter()
        self.whole: dict[str, list[str]] = {}

    def layer(self, stored: tuple[_Stored, ...]) -> Layer:
        """Attention, MLP and experts where their names say so, the rest as a block of whole tensors."""
        weights = [s for s in stored if s.leaf != "bias"]
        blocks: dict[str, list[TensorSpec]] = {"attention": [], "mlp": [], "moe": [], "rest": []}
        widths: dict[str, LogicalAxis] = {}
        self.complete = self._complete(weights)
        for s in weights:
            role, spec, block = self._weight(s, widths)
            blocks[block].append(spec)
            bias = next(
                (x for x in stored if x.leaf == "bias" and x.name == s.name.removesuffix("weight") + "bias"), None
            )
            if bias is not None:
                row = role in ("o", "down")
                lead = spec.dims[:-1] if not row else (fixed(bias.shape[0]),)
                fits = tuple(d.length for d in lead) == bias.shape
                dims = lead if fits else tuple(fixed(n) for n in bias.shape)
                blocks[block].append(self._spec(f"{spec.role}.bias", bias, dims, row_parallel_bias=row))
        known = {t.name for part in blocks.values() for t in part}
        blocks["rest"] += [self._keep(s, "no matrix") for s in stored if s.name not in known]
        return self._assemble(blocks, widths)

    def _role(self, s: _Stored) -> str:
        """What a module is, by its own name or by the style that a tp_plan gives it."""
        role = _ROLE_OF.get(s.module, "")
        style = style_of(s.name.removesuffix(".weight"), self.styles)
        if style == "whole":
            return ""
        return role or {"column": "up", "row": "down"}.get(style, "")

    def _complete(self, weights: list[_Stored]) -> set[tuple[str, bool]]:
        """(attention or mlp, routed) where both the opening and the closing matrices can be cut."""
        found: dict[tuple[str, bool], set[str]] = {}
        for s in weights:
            role, routed = self._role(s), bool(s.experts)
            if self._dims(role, s, {}, routed) is not None:
                found.setdefault((_GROUP_OF[role], routed), set()).add(role)
        return {key for key, roles in found.items() if any(need <= roles for need in _PAIRS[key[0]])}

    def _assemble(self, blocks: dict[str, list[TensorSpec]], widths: dict[str, LogicalAxis]) -> Layer:
        mixers: tuple[Block, ...] = ()
        feed_forward: tuple[Block, ...] = ()
        if blocks["attention"] and self.q and self.kv:
            attention = Attention(
                tuple(blocks["attention"]),
                q_axis=self.q,
                kv_axis=self.kv,
                head_dim=self.head_dim,
                v_head_dim=self.head_dim,
                scale=self.head_dim**-0.5,
                rope=None,
            )
            mixers = (attention,)
        if blocks["mlp"]:
            feed_forward += (DenseMlp(tuple(blocks["mlp"]), mlp_axis=widths["mlp"], activation="unknown"),)
        if blocks["moe"]:
            experts = widths["experts"]
            width = widths.get("expert_mlp", LogicalAxis(Axis.EXPERT_MLP, 1))
            top_k = self.config.integer("num_experts_per_tok", "num_experts_per_token", "top_k", default=1)
            routing = Routing(top_k=min(top_k, experts.units))
            moe = Moe(tuple(blocks["moe"]), expert_axis=experts, mlp_axis=width, routing=routing, activation="unknown")
            feed_forward += (moe,)
        return Layer(mixers=mixers, feed_forward=feed_forward, others=(Block(tuple(blocks["rest"])),))

    def _weight(self, s: _Stored, widths: dict[str, LogicalAxis]) -> tuple[str, TensorSpec, str]:
        """(role, spec, block) of a matrix or of anything else that is not a bias."""
        role = self._role(s)
        stacked = not s.experts and len(s.shape) == 3 and "experts" in s.name
        routed = bool(s.experts) or stacked
        if s.experts:
            widths.setdefault("experts", LogicalAxis(Axis.EXPERTS, s.experts))
        if s.leaf == "" and not (routed and len(s.shape) == 3):
            return role, self._keep(s, "no weight of a linear layer"), "moe" if s.experts else "rest"
        if stacked:
            if "shared" in s.name:
                return role, self._keep(s, "experts of every token"), "rest"
            axis = LogicalAxis(Axis.EXPERTS, s.shape[0])
            widths.setdefault("experts", axis)
            self.cut["stacked experts"] += 1
            return role, self._spec(role or s.module, s, (along(axis), *(fixed(n) for n in s.shape[1:]))), "moe"
        group = (_GROUP_OF.get(role, ""), routed)
        dims = self._dims(role, s, widths, routed) if group in self.complete else None
        if dims is None:
            reason = "no linear layer that is known"
            if role:
                fits = group in self.complete
                reason = "its shape does not fit its name" if fits else "the matrices around it are not known"
            return role, self._keep(s, reason), "moe" if s.experts else "rest"
        block = "moe" if routed else _GROUP_OF[role]
        self.cut[role] += 1
        return role, self._spec(f"{role}.weight", s, dims), block

    def _dims(self, role: str, s: _Stored, widths: dict[str, LogicalAxis], routed: bool) -> tuple[Dim, ...] | None:
        """Dims [out, in] of a recognised matrix; None where the shape contradicts its name."""
        if len(s.shape) != 2 or not role or s.dtype in ("I32", "U8"):
            return None
        out, inner = s.shape
        # A matrix stored [in, out], or one of a narrower part of the model, has its hidden side elsewhere.
        if not routed and self.hidden not in (0, out if role in ("o", "down") else inner):
            return None
        if role in ("q", "k", "v", "qkv", "o"):
            return self._attention_dims(role, out, inner)
        name, axis = ("expert_mlp", Axis.EXPERT_MLP) if routed else ("mlp", Axis.MLP)
        width = inner if role == "down" else out // 2 if role == "gate_up" else out
        mlp = along(LogicalAxis(axis, width))
        widths.setdefault(name, LogicalAxis(axis, width))
        if role == "down":
            return fixed(out), mlp
        return (concat(mlp, mlp) if role == "gate_up" else mlp), fixed(inner)

    def _attention_dims(self, role: str, out: int, inner: int) -> tuple[Dim, ...] | None:
        if self.q is None or self.kv is None:
            return None
        q, kv = along(self.q, self.head_dim), along(self.kv, self.head_dim)
        if role == "o":
            return (fixed(out), q) if inner == q.length else None
        dim = {"q": q, "k": kv, "v": kv, "qkv": concat(q, kv, kv)}[role]
        return (dim, fixed(inner)) if out == dim.length else None

    def ends(self, entries: list[TensorEntry]) -> tuple[tuple[TensorSpec, ...], ...]:
        """(embedding, head, the rest) of the tensors outside of the layers."""
        embed: list[TensorSpec] = []
        head: list[TensorSpec] = []
        rest: list[TensorSpec] = []
        for entry in entries:
            s = replace(_stored(entry, entry.name), name=entry.name, experts=0)
            where, role = (embed, "embed") if s.module in EMBED else (head, "head") if s.module in HEAD else (rest, "")
            if role and len(s.shape) == 2:
                self.cut[role] += 1
                dims = (along(LogicalAxis(Axis.VOCAB, s.shape[0])), fixed(s.shape[1]))
                where.append(self._spec(f"{role}.weight", s, dims))
            else:
                rest.append(self._keep(s, "outside of the layers"))
        return tuple(embed), tuple(head), tuple(rest)

    def _keep(self, s: _Stored, reason: str) -> TensorSpec:
        """A tensor that every rank holds whole; those of an expert stay with their expert."""
        if len(s.shape) > 1:
            self.whole.setdefault(reason, []).append(s.name)
        return self._spec(s.name, s, tuple(fixed(n) for n in s.shape))

    def _spec(self, role: str, s: _Stored, dims: tuple[Dim, ...], row_parallel_bias: bool = False) -> TensorSpec:
        experts = LogicalAxis(Axis.EXPERTS, s.experts) if s.experts else None
        return TensorSpec(role, s.name, dims, s.dtype, experts=experts, row_parallel_bias=row_parallel_bias)

    def report(self, listed: list[str]) -> tuple[str, ...]:
        """What was recognised, what is replicated and why."""
        found = ", ".join(self.cut) or "nothing"
        named = f"architecture {listed} is not described" if listed else "config.json names no architectures"
        notes = [f"{named}: planned from headers; recognised and cut: {found}"]
        if self.q is None:
            notes.append("attention is whole on every rank: the config does not say num_attention_heads")
        for reason, names in self.whole.items():
            names = list(dict.fromkeys(names))
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            notes.append(f"whole on every rank ({reason}): {', '.join(names[:SHOWN])}{more}")
        return tuple(notes)
