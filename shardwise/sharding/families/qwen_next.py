"""Qwen3-Next, Qwen3.5 and Qwen3.6: three gated delta layers to one of gated attention, dense or with experts."""

from shardwise.sharding.axes import fixed
from shardwise.sharding.blocks import attention, dense_mlp, moe, pre_norm_layer, stacked_moe
from shardwise.sharding.builder import Builder
from shardwise.sharding.config import Config
from shardwise.sharding.families.qwen_moe import shared_expert, sparse_layers
from shardwise.sharding.model import Extra, Layer, ModelSpec
from shardwise.sharding.mtp import replace_prefix
from shardwise.sharding.recurrent import qwen_delta
from shardwise.sharding.spec import Block, Routing

PARTIAL = 0.25
DENSE = ("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration")
"""Without experts, whatever fields their configs have."""


def build(config: Config, name: str, architecture: str) -> ModelSpec:
    text = config.section("text_config")
    first = architecture == "Qwen3NextForCausalLM"
    prefix = "model.language_model." if architecture.endswith("ForConditionalGeneration") else "model."
    b = Builder(text, name, architecture, prefix=prefix, norm_weight_offset=1.0, rope_partial=PARTIAL)
    b.norm_eps = text.number("rms_norm_eps", default=1e-6)
    module, count = f"{prefix}layers.{{layer}}", text.integer("num_hidden_layers")

    # Transformers writes one tensor an expert where the published Qwen3.5 files stack them.
    per_expert = first or config.has_tensor(f"{prefix}layers.0.mlp.experts.0.up_proj.weight")

    def layer(key: tuple[str, bool]) -> Layer:
        kind, sparse = key
        mixer: Block
        if kind == "linear_attention":
            mixer = qwen_delta(b, f"{module}.linear_attn", fused=first)
        else:
            mixer = attention(
                b,
                f"{module}.self_attn",
                qkv_bias=text.flag("attention_bias"),
                qk_norm="head",
                output_gate="per_element" if text.flag("attn_output_gate", default=True) else None,
                rope=b.rope(text.integer("head_dim")),
            )
        feed_forward = _experts(b, text, f"{module}.mlp", per_expert) if sparse else _dense(b, text, f"{module}.mlp")
        return pre_norm_layer(b, mixer, feed_forward, prefix=module)

    routed = architecture not in DENSE and text.integer("num_experts", least=0) > 0
    sparse = sparse_layers(text, count) if routed else [False] * count
    layers = b.layers(layer, list(zip(_types(text, count), sparse, strict=True)))
    _mtp(b, text, layer(("full_attention", sparse[-1])), module, first)
    return b.model(layers)


def _types(c: Config, count: int) -> list[str]:
    interval = c.integer("full_attention_interval", default=4)
    default = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(count)]
    return c.list("layer_types", default=default, length=count, of=str)


def _dense(b: Builder, c: Config, module: str):
    return dense_mlp(b, module, c.integer("intermediate_size"))


def _experts(b: Builder, c: Config, module: str, per_expert: bool):
    experts = c.integer("num_experts")
    routing = Routing(
        top_k=c.integer("num_experts_per_tok", most=experts), normalize=c.flag("norm_topk_prob", default=True)
    )
    width = c.integer("moe_intermediate_size")
    more = shared_expert(b, module, c.integer("shared_expert_intermediate_size"))
    if per_expert:
        return moe(b, module, experts, width, routing, **more)
    return stacked_moe(b, module, experts, width, routing, **more)


def _mtp(b: Builder, c: Config, like: Layer, module: str, first: bool) -> None:
    """One attention layer after a projection of embedding and hidden state; embedding and head are the model's."""
    count = 1 if first else c.integer("mtp_num_hidden_layers", default=0, least=0)
    if not count:
        return
    tensors = tuple(replace_prefix(t, module, "mtp.layers.{layer}") for t in like.tensors)
    b.extras.append(Extra(name="mtp", tensors=tensors, layers=tuple(range(count)), note=f"{count} layers"))
    ends = [b.vector("mtp.project.weight", "mtp.fc.weight", b.hidden, fixed(2 * b.hidden_size))]
    ends += [
        b.vector(f"mtp.{n}.weight", f"mtp.{n}.weight", b.hidden)
        for n in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    ]
    b.extras.append(Extra(name="mtp", tensors=tuple(ends)))
