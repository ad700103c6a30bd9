"""Qwen1.5/2-MoE (shared expert with a gate), Qwen3-MoE, and the text part of Qwen3-VL-MoE (stacked experts)."""

from shardwise.sharding.axes import fixed
from shardwise.sharding.blocks import attention, dense_mlp, moe, pre_norm_layer, stacked_moe
from shardwise.sharding.builder import Builder
from shardwise.sharding.config import Config
from shardwise.sharding.families.llama import windows
from shardwise.sharding.model import Layer, ModelSpec
from shardwise.sharding.spec import Moe, Routing


def build(config: Config, name: str, architecture: str) -> ModelSpec:
    text = config.section("text_config")
    nested = architecture == "Qwen3VLMoeForConditionalGeneration"
    prefix = "model.language_model." if nested else "model."
    b = Builder(text, name, architecture, prefix=prefix, norm_eps=text.number("rms_norm_eps", default=1e-6))
    module = f"{prefix}layers.{{layer}}"
    count = text.integer("num_hidden_layers")
    old = architecture == "Qwen2MoeForCausalLM"

    def layer(key: tuple[bool, int | None]) -> Layer:
        sparse, window = key
        mixer = attention(
            b,
            f"{module}.self_attn",
            qkv_bias=text.flag("qkv_bias", default=True) if old else text.flag("attention_bias"),
            o_bias=False if old else text.flag("attention_bias"),
            qk_norm=None if old else "head",
            window=window,
        )
        dense = None if sparse else dense_mlp(b, f"{module}.mlp", text.integer("intermediate_size"))
        return pre_norm_layer(b, mixer, dense or _experts(b, text, f"{module}.mlp", nested, first), prefix=module)

    sparse = sparse_layers(text, count)
    first = f"{prefix}layers.{sparse.index(True) if True in sparse else 0}.mlp"
    keys = list(zip(sparse, windows(text, architecture, count), strict=True))
    return b.model(b.layers(layer, keys))


def sparse_layers(c: Config, count: int) -> list[bool]:
    """Which layers have experts: every `decoder_sparse_step`-th, except `mlp_only_layers`."""
    step = c.integer("decoder_sparse_step", default=1)
    dense = set(c.list("mlp_only_layers", default=[], of=int))
    return [i not in dense and (i + 1) % step == 0 for i in range(count)]


def _experts(b: Builder, c: Config, module: str, stacked: bool, first: str) -> Moe:
    """`first`: `module` in the first layer that has experts."""
    experts = c.integer("num_experts", "num_local_experts")
    normalize = c.flag("norm_topk_prob", default=stacked)
    routing = Routing(top_k=c.integer("num_experts_per_tok", most=experts), normalize=normalize)
    width = c.integer("moe_intermediate_size")
    if stacked:  # published [E, in, out]; Transformers writes models of its own as [E, out, in]
        transposed = c.shape_of(f"{first}.experts.gate_up_proj") != (experts, 2 * width, b.hidden_size)
        return stacked_moe(b, module, experts, width, routing, transposed=transposed)
    shared = c.integer("shared_expert_intermediate_size", default=0, least=0)
    if not shared:
        return moe(b, module, experts, width, routing)
    return moe(b, module, experts, width, routing, **shared_expert(b, module, shared))


def shared_expert(b: Builder, module: str, width: int) -> dict:
    """The shared expert of `width` with its sigmoid gate, as options of a MoE block."""
    return {
        "shared": dense_mlp(b, f"{module}.shared_expert", width, role="shared."),
        "shared_gated": True,
        "extra": b.linear("shared_gate", f"{module}.shared_expert_gate", fixed(1), b.hidden, plain=True),
    }
