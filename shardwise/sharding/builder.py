"""What family files are written with: linears, norms and attention in the checkpoint's names and storage format."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardwise.sharding.axes import Axis, Dim, LogicalAxis, along, fixed
from shardwise.sharding.config import Config
from shardwise.sharding.formats import DTYPES, Linear, bias
from shardwise.sharding.model import Extra, Layer, ModelSpec
from shardwise.sharding.quantization import Quantization, quantization_of
from shardwise.sharding.spec import Embedding, Head, Norm, Rope
from shardwise.sharding.tensors import TensorSpec
from shardwise.sharding.vision import vision_extras

Tensors = tuple[TensorSpec, ...]
SCALING_NUMBERS = {
    "factor",
    "alpha",
    "mscale",
    "mscale_all_dim",
    "beta_fast",
    "beta_slow",
    "low_freq_factor",
    "high_freq_factor",
}
"""Fields of a rope scaling that must be positive numbers, at most MOST_SCALING."""
MOST_SCALING = 1e9


@dataclass
class Builder:
    """Builds blocks of one model. `config` is the text decoder's section."""

    config: Config
    name: str
    architecture: str
    prefix: str = "model."
    norm_eps: float = 1e-6
    norm_kind: str = "rms"
    norm_bias: bool = False
    norm_weight_offset: float = 0.0
    head_dim: int = 0
    """Size of a head where the config does not say, as Transformers has it; 0: the hidden size over the heads."""
    rope_theta: float = 10000.0
    rope_partial: float = 1.0
    """Base of the rotation, and the part of a head that it turns, where the config does not say."""
    notes: list[str] = field(default_factory=list)
    extras: list[Extra] = field(default_factory=list)
    layer_number: int | None = None
    """The layer that is being built: storage may differ from layer to layer."""

    def __post_init__(self):
        c = self.config
        self.hidden_size = c.integer("hidden_size", "n_embd")
        self.hidden = fixed(self.hidden_size)
        declared = c.text("dtype", "torch_dtype", default="bfloat16")
        if declared not in DTYPES:
            raise c.error(("dtype", "torch_dtype"), declared, " or ".join(DTYPES))
        self.dtype = DTYPES[declared]
        self.quantization: Quantization = quantization_of(c)
        if self.quantization.name == "none" and not c.has("torch_dtype", "dtype") and c.names is None:
            self.notes.append("the config has no torch_dtype: weights count as bfloat16 unless --dtype says otherwise")

    def linear(self, role: str, name: str, out: Dim, inner: Dim, *, bias_too: bool = False, **options: Any) -> Tensors:
        """A weight [out, in] as it is stored, and its bias. `options`: lead, experts, transposed, suffix, plain."""
        plain = options.pop("plain", False)
        linear = Linear(role, name, out, inner, self.dtype, **options)
        tensors = (linear.weight(self.dtype),) if plain else self.quantization.store(linear, self.layer_number)
        return (*tensors, bias(linear, bool(inner.axes))) if bias_too else tensors

    def vector(self, role: str, name: str, *dims: Dim, dtype: str | None = None) -> TensorSpec:
        """A tensor that is never quantised; `name` is complete."""
        return TensorSpec(role, name, dims, dtype or self.dtype)

    def norm(self, where: str, name: str, dim: Dim | None = None) -> Norm:
        """A norm over `dim` (hidden by default); `name` is the module's."""
        dims = (dim or self.hidden,)
        tensors: Tensors = (self.vector(f"{where}.weight", f"{name}.weight", *dims),)
        if self.norm_bias:
            tensors += (self.vector(f"{where}.bias", f"{name}.bias", *dims),)
        return Norm(tensors, kind=self.norm_kind, eps=self.norm_eps, weight_offset=self.norm_weight_offset)

    def layers(self, make: Callable[[Any], Layer], keys: Sequence[Any]) -> tuple[Layer, ...]:
        """`make(key)` for the key of every layer; layers that are equal share one object."""
        made: dict[Any, Layer] = {}
        layers = []
        for number, key in enumerate(keys):
            self.layer_number = number
            if self.quantization.by_layer:
                layer = make(key)
                layers.append(made.setdefault((key, tuple(layer.tensors)), layer))
            else:
                layers.append(made[key] if key in made else made.setdefault(key, make(key)))
        self.layer_number = None
        return tuple(layers)

    def model(self, layers: tuple[Layer, ...], *, tied_default: bool = False, **options: Any) -> ModelSpec:
        """Embedding, layers, final norm and head. Options override the names and hyperparameters of the ends:

        embed_name, head_name, final_norm_name, embedding_multiplier, head_multiplier, softcap, embedding_tensors, tied.
        """
        c = self.config
        vocab = LogicalAxis(Axis.VOCAB, c.integer("vocab_size"))
        tied = options.pop("tied", None)
        if tied is None:  # where both have a word in it, the whole model's counts before its text decoder's
            own = c.flag("tie_word_embeddings", default=tied_default)
            tied = c.outermost.flag("tie_word_embeddings", default=own)
        embed_name = options.pop("embed_name", f"{self.prefix}embed_tokens")
        head_name = options.pop("head_name", "lm_head")
        if tied and c.has_tensor(f"{head_name}.weight"):  # what a checkpoint holds counts before the flag
            self.notes.append(f"the config ties {head_name} to the embedding, but the checkpoint has both: both count")
            tied = False
        embed = (self.vector("embed.weight", f"{embed_name}.weight", along(vocab), self.hidden),)
        head = () if tied else self.linear("head", head_name, along(vocab), self.hidden)
        eos = c.raw("eos_token_id")
        return ModelSpec(
            name=self.name,
            architecture=self.architecture,
            hidden=self.hidden_size,
            vocab=vocab.units,
            embedding=Embedding(
                embed + options.pop("embedding_tensors", ()),
                vocab=vocab.units,
                multiplier=options.pop("embedding_multiplier", 1.0),
                learned_positions=options.pop("learned_positions", 0),
            ),
            layers=layers,
            final_norm=self.norm("final_norm", options.pop("final_norm_name", f"{self.prefix}norm")),
            head=Head(
                head, tied=tied, softcap=options.pop("softcap", None), multiplier=options.pop("head_multiplier", 1.0)
            ),
            dtype=self.dtype,
            quantization=self.quantization.name,
            max_positions=c.integer("max_position_embeddings", "n_positions", default=0, least=0),
            bos_token_id=c.integer("bos_token_id", default=None, least=0)
            if not isinstance(c.raw("bos_token_id"), list)
            else None,
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            notes=tuple(self.notes),
            extras=(*vision_extras(c, self.hidden_size, self.dtype), *self._mtp_extras()),
            **options,
        )

    def _mtp_extras(self) -> list[Extra]:
        """Those that the family lists; where it lists no MTP layers that the config announces, their number alone."""
        announced = self.config.integer("num_nextn_predict_layers", "num_mtp_modules", default=0, least=0)
        if not announced or any(extra.name == "mtp" for extra in self.extras):
            return self.extras
        return [*self.extras, Extra(name="mtp", note=f"{announced} layers: bytes are known from headers only")]

    def rope(
        self,
        head_dim: int,
        *,
        theta: float | None = None,
        partial: float | None = None,
        scaled: bool = True,
        kind: str = "full_attention",
        default_theta: float | None = None,
    ) -> Rope:
        """Rotary embedding from `rope_theta`, `partial_rotary_factor`, `rope_scaling` or `rope_parameters`.

        `kind`: which kind of layer, where `rope_parameters` differ by kind. `default_theta` replaces `rope_theta`
        where the parameters of that kind do not say.
        """
        c = self.config
        fields = c.own("rope_scaling") if c.has("rope_scaling") else c.own("rope_parameters")
        if isinstance(fields.raw(kind), dict):
            fields = fields.own(kind)
        if theta is None:
            theta = fields.number("rope_theta", default=default_theta, above=0.0)
            theta = theta or c.number("rope_theta", default=self.rope_theta, above=0.0)
        if partial is None:
            partial = fields.fraction("partial_rotary_factor", default=None)
            partial = c.fraction("partial_rotary_factor", default=self.rope_partial) if partial is None else partial
        name = fields.text("rope_type", "type", default="default") if scaled else "default"
        return Rope(theta=theta, dim=int(head_dim * partial), kind=name, scaling=self._scaling(fields, name))

    def _scaling(self, fields: Config, name: str) -> tuple[tuple[str, Any], ...]:
        """The published fields of a rope scaling, sorted, without those that `Rope` has of its own."""
        if name == "default":
            return ()
        own = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
        present = {k: v for k, v in fields.data.items() if k not in own and v is not None}
        for name in SCALING_NUMBERS & present.keys():
            present[name] = fields.number(name, above=0.0, most=MOST_SCALING)
        found = {k: tuple(v) if isinstance(v, list) else v for k, v in present.items()}
        original = self.config.raw("original_max_position_embeddings")
        if original:
            found.setdefault("original_max_position_embeddings", original)
        return tuple(sorted(found.items()))
