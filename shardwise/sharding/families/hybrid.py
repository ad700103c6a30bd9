"""Granite 4 hybrid, Bamba (Mamba-2 or attention a layer) and Falcon-H1 (both in every layer)."""

from typing import Any

from shardwise.sharding.blocks import attention, dense_mlp, pre_norm_layer, stacked_moe
from shardwise.sharding.builder import Builder
from shardwise.sharding.config import Config
from shardwise.sharding.model import Layer, ModelSpec
from shardwise.sharding.recurrent import mamba2
from shardwise.sharding.spec import Attention, Mamba2, Moe, Routing

LAYER = "model.layers.{layer}"
PRE_FF = ("input_layernorm", "pre_ff_layernorm")
GRANITE = "GraniteMoeHybridForCausalLM"
FALCON = "FalconH1ForCausalLM"
BAMBA = "BambaForCausalLM"
BAMBA_PARTIAL = 0.5


def build(config: Config, name: str, architecture: str) -> ModelSpec:
    b = Builder(config, name, architecture, norm_eps=config.number("rms_norm_eps", default=1e-5))
    b.rope_partial = BAMBA_PARTIAL if architecture == BAMBA else 1.0
    count = config.integer("num_hidden_layers")
    if architecture == FALCON:
        return _falcon(b, config, count)
    granite = architecture == GRANITE

    def layer(kind: str) -> Layer:
        mixer = _mamba(b, config) if kind == "mamba" else _attention(b, config, granite)
        if granite:
            return pre_norm_layer(
                b,
                mixer,
                _granite_experts(b, config),
                prefix=LAYER,
                residual_multiplier=config.number("residual_multiplier", default=1.0),
            )
        width, biased = config.integer("intermediate_size"), config.flag("mlp_bias")
        feed_forward = dense_mlp(b, f"{LAYER}.feed_forward", width, bias=biased)
        return pre_norm_layer(b, mixer, feed_forward, prefix=LAYER, norms=PRE_FF)

    layers = b.layers(layer, _types(b, config, count))
    if not granite:
        return b.model(layers, final_norm_name="model.final_layernorm")
    return b.model(
        layers,
        tied_default=True,
        embedding_multiplier=config.number("embedding_multiplier", default=1.0),
        head_multiplier=1 / config.number("logits_scaling", default=1.0, above=0.0),
    )


def _types(b: Builder, c: Config, count: int) -> list[str]:
    if c.has("layer_types", "layers_block_type"):
        types = c.list("layer_types", "layers_block_type", length=count, of=str)
        return ["mamba" if t in ("mamba", "linear_attention") else "attention" for t in types]
    if not c.has("attn_layer_indices"):
        b.notes.append("no layer is said to be attention (attn_layer_indices): all are planned as Mamba-2")
    indices = set(c.list("attn_layer_indices", default=[], of=int))
    return ["attention" if i in indices else "mamba" for i in range(count)]


def _mamba(b: Builder, c: Config, **options) -> Mamba2:
    heads = c.integer("mamba_n_heads")
    width = c.integer("mamba_d_ssm", default=c.integer("mamba_expand", default=2) * b.hidden_size)
    return mamba2(
        b,
        f"{LAYER}.mamba",
        heads=heads,
        head_dim=c.integer("mamba_d_head", default=width // heads)
        if c.raw("mamba_d_head") != "auto"
        else width // heads,
        groups=c.integer("mamba_n_groups", default=1),
        state=c.integer("mamba_d_state"),
        kernel=c.integer("mamba_d_conv"),
        conv_bias=c.flag("mamba_conv_bias", default=True),
        proj_bias=c.flag("mamba_proj_bias"),
        chunk=c.integer("mamba_chunk_size", default=256),
        activation=c.text("hidden_act", default="silu"),
        dt_limits=tuple(c.list("time_step_limit", default=[0.0, float("inf")], of=(int, float), length=2)),
        **options,
    )


def _attention(b: Builder, c: Config, granite: bool) -> Attention:
    if not granite:
        return attention(b, f"{LAYER}.self_attn", qkv_bias=c.flag("attention_bias"))
    rotated = c.text("position_embedding_type", default="nope") == "rope"
    scale = c.number("attention_multiplier", default=None)
    options: dict[str, Any] = {} if rotated else {"rope": None}
    return attention(b, f"{LAYER}.self_attn", qkv_bias=c.flag("attention_bias"), scale=scale, **options)


def _granite_experts(b: Builder, c: Config):
    """All experts and a shared MLP, both with gate and up in one projection."""
    width = c.integer("shared_intermediate_size")
    shared: dict[str, Any] = {"fused": "input_linear", "names": ("", "", "output_linear")}
    experts = c.integer("num_local_experts", least=0)
    if not experts:
        return dense_mlp(b, f"{LAYER}.shared_mlp", width, **shared)
    block: Moe = stacked_moe(
        b,
        f"{LAYER}.block_sparse_moe",
        experts,
        c.integer("intermediate_size"),
        Routing(top_k=c.integer("num_experts_per_tok", most=experts), softmax_after_topk=True),
        names=("input_linear", "output_linear"),
        suffix=".weight",
        router="router.layer",
        shared=dense_mlp(b, f"{LAYER}.shared_mlp", width, role="shared.", **shared),
    )
    return block


def _falcon(b: Builder, c: Config, count: int) -> ModelSpec:
    gate, down = c.list("mlp_multipliers", default=[1.0, 1.0], length=2, of=(int, float))

    def layer(_: None) -> Layer:
        heads = attention(
            b,
            f"{LAYER}.self_attn",
            qkv_bias=c.flag("attention_bias"),
            key_multiplier=c.number("key_multiplier", default=1.0),
            in_multiplier=c.number("attention_in_multiplier", default=1.0),
            out_multiplier=c.number("attention_out_multiplier", default=1.0),
        )
        state = _mamba(
            b,
            c,
            out_bias=c.flag("projectors_bias"),
            gated_norm=c.flag("mamba_rms_norm"),
            norm_before_gate=c.flag("mamba_norm_before_gate", default=True),
            in_multiplier=c.number("ssm_in_multiplier", default=1.0),
            out_multiplier=c.number("ssm_out_multiplier", default=1.0),
            segment_multipliers=tuple(c.list("ssm_multipliers", default=[], of=(int, float))),
        )
        feed_forward = dense_mlp(
            b,
            f"{LAYER}.feed_forward",
            c.integer("intermediate_size"),
            bias=c.flag("mlp_bias"),
            gate_multiplier=gate,
            down_multiplier=down,
        )
        return Layer(
            mixers=(heads, state),
            feed_forward=(feed_forward,),
            mixer_norm=b.norm("mixer_norm", f"{LAYER}.{PRE_FF[0]}"),
            feed_forward_norm=b.norm("feed_forward_norm", f"{LAYER}.{PRE_FF[1]}"),
        )

    return b.model(
        b.layers(layer, [None] * count),
        final_norm_name="model.final_layernorm",
        embedding_multiplier=c.number("embedding_multiplier", default=1.0),
        head_multiplier=c.number("lm_head_multiplier", default=1.0),
    )
