"""GPT-2 (weights stored [in, out]) and GPTBigCode (one KV head): learned positions, layer norms, biases, tied head."""

from shardwise.sharding.axes import Axis, LogicalAxis, along, concat, fixed, interleave
from shardwise.sharding.blocks import activation_of, head_axes
from shardwise.sharding.builder import Builder
from shardwise.sharding.config import Config
from shardwise.sharding.model import Layer, ModelSpec
from shardwise.sharding.spec import Attention, DenseMlp


def build(config: Config, name: str, architecture: str) -> ModelSpec:
    # The published GPT-2 files leave the first component out.
    root = "" if config.has_tensor("wte.weight") else "transformer."
    b = Builder(config, name, architecture, prefix=root, norm_kind="layer", norm_bias=True)
    b.norm_eps = config.number("layer_norm_epsilon", default=1e-5)
    module = f"{root}h.{{layer}}"
    transposed = architecture == "GPT2LMHeadModel"
    multi_query = architecture == "GPTBigCodeForCausalLM" and config.flag("multi_query", default=True)

    def layer(_: None) -> Layer:
        return Layer(
            mixers=(_attention(b, config, f"{module}.attn", transposed, multi_query),),
            feed_forward=(_mlp(b, config, f"{module}.mlp", transposed),),
            mixer_norm=b.norm("mixer_norm", f"{module}.ln_1"),
            feed_forward_norm=b.norm("feed_forward_norm", f"{module}.ln_2"),
        )

    positions = config.integer("n_positions", default=1024)
    learned = b.vector("positions.weight", f"{root}wpe.weight", fixed(positions), b.hidden)
    return b.model(
        b.layers(layer, [None] * config.integer("n_layer", "num_hidden_layers")),
        tied_default=True,
        embed_name=f"{root}wte",
        final_norm_name=f"{root}ln_f",
        embedding_tensors=(learned,),
        learned_positions=positions,
    )


def _attention(b: Builder, c: Config, module: str, transposed: bool, multi_query: bool) -> Attention:
    heads = c.integer("n_head", "num_attention_heads")
    if b.hidden_size % heads:
        raise c.error(("n_embd",), b.hidden_size, f"a multiple of n_head {heads}")
    d = b.hidden_size // heads
    q_axis, kv_axis = head_axes(b, heads, 1 if multi_query else heads)
    parts = (along(q_axis, d), along(kv_axis, d), along(kv_axis, d))
    # GPTBigCode without multi-query keeps each head's q, k, v together.
    by_head = not transposed and not multi_query
    qkv = interleave((q_axis, d), (kv_axis, d), (kv_axis, d)) if by_head else concat(*parts)
    tensors = b.linear("qkv", f"{module}.c_attn", qkv, b.hidden, bias_too=True, transposed=transposed)
    tensors += b.linear("o", f"{module}.c_proj", b.hidden, parts[0], bias_too=True, transposed=transposed)
    return Attention(
        tensors,
        q_axis=q_axis,
        kv_axis=kv_axis,
        head_dim=d,
        v_head_dim=d,
        scale=d**-0.5,
        rope=None,
        norm_eps=b.norm_eps,
        qkv_grouped=by_head,
    )


def _mlp(b: Builder, c: Config, module: str, transposed: bool) -> DenseMlp:
    axis = LogicalAxis(Axis.MLP, c.integer("n_inner", default=4 * b.hidden_size))
    mlp = along(axis)
    tensors = b.linear("up", f"{module}.c_fc", mlp, b.hidden, bias_too=True, transposed=transposed)
    tensors += b.linear("down", f"{module}.c_proj", b.hidden, mlp, bias_too=True, transposed=transposed)
    return DenseMlp(tensors, mlp_axis=axis, activation=activation_of(b), gated=False)
