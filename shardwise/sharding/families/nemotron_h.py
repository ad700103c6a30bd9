"""Nemotron-H and Nemotron 3: one block a layer (Mamba-2, attention without rotation, MLP or latent experts)."""

from shardwise.sharding.axes import fixed
from shardwise.sharding.blocks import attention, dense_mlp, heads_of, moe
from shardwise.sharding.builder import Builder, Tensors
from shardwise.sharding.config import Config
from shardwise.sharding.model import Extra, Layer, ModelSpec
from shardwise.sharding.mtp import replace_prefix
from shardwise.sharding.recurrent import mamba2
from shardwise.sharding.spec import Moe, Routing

LAYER = "backbone.layers.{layer}"
MIXER = f"{LAYER}.mixer"
LETTERS = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
SYNONYMS = {"linear_attention": "mamba", "full_attention": "attention"}


def build(config: Config, name: str, architecture: str) -> ModelSpec:
    eps = config.number("layer_norm_epsilon", "norm_eps", "rms_norm_eps", default=1e-5)
    b = Builder(config, name, architecture, prefix="backbone.", norm_eps=eps, head_dim=128)

    def layer(kind: str) -> Layer:
        if kind in ("mamba", "attention"):
            mixer = _mamba(b, config) if kind == "mamba" else _attention(b, config)
            return Layer(mixers=(mixer,), mixer_norm=b.norm("mixer_norm", f"{LAYER}.norm"))
        block = _experts(b, config) if kind == "moe" else _dense(b, config, config.integer("intermediate_size"))
        return Layer(feed_forward=(block,), feed_forward_norm=b.norm("feed_forward_norm", f"{LAYER}.norm"))

    layers = b.layers(layer, _types(config, "hybrid_override_pattern", "layers_block_type"))
    if config.integer("num_nextn_predict_layers", default=0, least=0):
        _mtp(b, [layer(kind) for kind in _mtp_types(config)])
    return b.model(layers, embed_name="backbone.embeddings", final_norm_name="backbone.norm_f")


def _types(c: Config, pattern: str, listed: str) -> list[str]:
    """Kind of every layer, from a pattern of letters or a list of words."""
    letters = c.text(pattern, default="")
    unknown = set(letters) - set(LETTERS)
    if unknown:
        raise c.error((pattern,), letters, f"letters of {''.join(LETTERS)}")
    types = [LETTERS[x] for x in letters] or [SYNONYMS.get(t, t) for t in c.list(listed, "layer_types", of=str)]
    count = c.integer("num_hidden_layers", default=max(len(types), 1))
    if count != len(types) or set(types) - set(LETTERS.values()):
        raise c.error((pattern, listed), types, f"{count} of {', '.join(LETTERS.values())}")
    return types


def _mtp_types(c: Config) -> list[str]:
    letters = c.text("mtp_hybrid_override_pattern", default="*E")
    return c.list("mtp_layers_block_type", default=[LETTERS[x] for x in letters if x in LETTERS], of=str)


def _mamba(b: Builder, c: Config):
    return mamba2(
        b,
        MIXER,
        heads=c.integer("mamba_num_heads"),
        head_dim=c.integer("mamba_head_dim"),
        groups=c.integer("n_groups"),
        state=c.integer("ssm_state_size"),
        kernel=c.integer("conv_kernel"),
        conv_bias=c.flag("use_conv_bias", default=True),
        proj_bias=c.flag("use_bias"),
        chunk=c.integer("chunk_size", default=128),
        activation=c.text("mamba_hidden_act", default="silu"),
        dt_limits=(c.number("time_step_min", "mamba_dt_min", default=0.001), float("inf")),
    )


def _attention(b: Builder, c: Config):
    q, kv, head_dim = heads_of(b)
    head_dim = c.integer("head_dim", "attention_head_dim", default=head_dim)
    return attention(b, MIXER, heads=(q, kv, head_dim), qkv_bias=c.flag("attention_bias"), rope=None)


def _dense(b: Builder, c: Config, width: int, module: str = MIXER, role: str = ""):
    activation = c.text("mlp_hidden_act", default="relu2")
    return dense_mlp(b, module, width, activation=activation, bias=c.flag("mlp_bias"), gated=False, role=role)


def _experts(b: Builder, c: Config) -> Moe:
    experts, latent = c.integer("n_routed_experts"), c.integer("moe_latent_size", default=0, least=0)
    shared = c.integer("moe_shared_expert_intermediate_size", default=0, least=0)
    extra: Tensors = ()
    if latent:
        biased = c.flag("mlp_bias")
        extra = b.linear("latent_down", f"{MIXER}.fc1_latent_proj", fixed(latent), b.hidden, bias_too=biased)
        extra += b.linear("latent_up", f"{MIXER}.fc2_latent_proj", b.hidden, fixed(latent), bias_too=biased)
    return moe(
        b,
        MIXER,
        experts,
        c.integer("moe_intermediate_size"),
        Routing(
            top_k=c.integer("num_experts_per_tok", most=experts),
            score="sigmoid",
            normalize=c.flag("norm_topk_prob", default=True),
            bias_correction=True,
            groups=c.integer("n_group", default=1),
            top_groups=c.integer("topk_group", default=1),
            group_score="top2_sum",
            scale=c.number("routed_scaling_factor", default=1.0),
        ),
        activation=c.text("mlp_hidden_act", default="relu2"),
        correction="gate.e_score_correction_bias",
        inner=fixed(latent) if latent else None,
        gated=False,
        shared=_dense(b, c, shared, f"{MIXER}.shared_experts", "shared.") if shared else None,
        extra=extra,
        latent=latent,
    )


def _mtp(b: Builder, layers: list[Layer]) -> None:
    """MTP blocks in names that are inferred from the decoder's: bytes are right, names may differ."""
    tensors = tuple(
        replace_prefix(t, LAYER, f"mtp.layers.{i}") for i, layer in enumerate(layers) for t in layer.tensors
    )
    base = "mtp.layers.0"
    ends = (
        b.vector("mtp.embed_norm.weight", f"{base}.enorm.weight", b.hidden),
        b.vector("mtp.hidden_norm.weight", f"{base}.hnorm.weight", b.hidden),
        b.vector("mtp.project.weight", f"{base}.eh_proj.weight", b.hidden, fixed(2 * b.hidden_size)),
        b.vector("mtp.norm.weight", f"mtp.layers.{len(layers) - 1}.final_layernorm.weight", b.hidden),
    )
    b.extras.append(Extra(name="mtp", tensors=tensors + ends, note="names inferred"))
