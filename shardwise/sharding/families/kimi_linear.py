"""Kimi Linear and Kimi K3: Kimi delta attention and latent attention without rotation, experts in a latent width."""

from dataclasses import replace

from shardwise.sharding.axes import fixed
from shardwise.sharding.blocks import dense_mlp, pre_norm_layer
from shardwise.sharding.builder import Builder
from shardwise.sharding.config import Config
from shardwise.sharding.latent import deepseek_moe, mla, sparse_layers
from shardwise.sharding.model import Layer, ModelSpec
from shardwise.sharding.recurrent import kimi_delta
from shardwise.sharding.spec import Block, Moe


def build(config: Config, name: str, architecture: str) -> ModelSpec:
    text = config.section("text_config")
    nested = "language_model." if architecture.startswith("KimiK3") else ""
    b = Builder(text, name, architecture, prefix=f"{nested}model.", norm_eps=text.number("rms_norm_eps", default=1e-5))
    module, count = f"{b.prefix}layers.{{layer}}", text.integer("num_hidden_layers")
    linear = text.own("linear_attn_config")
    # Layers are numbered from 1 there.
    delta = set(linear.list("kda_layers", of=int))
    if text.has("attn_res_block_size"):
        b.notes.append("attention residuals (attn_res_block_size) hold small tensors that the planner does not list")

    # Transformers gives the dense layers the experts' name when it writes them.
    renamed = config.has_tensor(f"{b.prefix}layers.0.block_sparse_moe.up_proj.weight")
    dense_name = "block_sparse_moe" if renamed else "mlp"

    def layer(key: tuple[bool, bool]) -> Layer:
        is_delta, sparse = key
        mixer: Block
        if is_delta:
            mixer = kimi_delta(
                b,
                f"{module}.self_attn",
                heads=linear.integer("num_heads"),
                head_dim=linear.integer("head_dim"),
                kernel=linear.integer("short_conv_kernel_size", default=4),
            )
        else:
            gate = "per_element" if text.flag("mla_use_output_gate") else None
            latent = mla(b, f"{module}.self_attn", output_gate=gate)
            mixer = replace(latent, rope=None) if text.flag("mla_use_nope") else latent
        experts = _experts(b, text, f"{module}.block_sparse_moe") if sparse else None
        dense = dense_mlp(b, f"{module}.{dense_name}", text.integer("intermediate_size"))
        return pre_norm_layer(b, mixer, experts or dense, prefix=module)

    keys = list(zip(((i + 1) in delta for i in range(count)), sparse_layers(b, count), strict=True))
    return b.model(b.layers(layer, keys), head_name=f"{nested}lm_head")


def _experts(b: Builder, c: Config, module: str) -> Moe:
    latent = c.integer("routed_expert_hidden_size", default=0, least=0)
    if not latent:
        return deepseek_moe(b, module, correction=True, names=("w1", "w3", "w2"))
    extra = b.linear("latent_down", f"{module}.latent_down_proj", fixed(latent), b.hidden, plain=True)
    extra += b.linear("latent_up", f"{module}.latent_up_proj", b.hidden, fixed(latent), plain=True)
    if c.flag("latent_moe_use_norm"):
        extra += (b.vector("latent_norm.weight", f"{module}.latent_norm.weight", fixed(latent)),)
    b.notes[:] = [*dict.fromkeys([*b.notes, "names of the latent projections of the experts are inferred"])]
    names = ("w1", "w3", "w2")
    return deepseek_moe(b, module, correction=True, names=names, inner=fixed(latent), latent=latent, extra=extra)
