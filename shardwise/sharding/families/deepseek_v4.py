"""DeepSeek V4: compressed attention with one KV head, grouped output projection, hyper-connections, hash layers."""

from dataclasses import replace
from typing import Any

from shardwise.sharding.axes import Axis, Dim, LogicalAxis, along, fixed
from shardwise.sharding.blocks import dense_mlp, moe, pre_norm_layer
from shardwise.sharding.builder import Builder, Tensors
from shardwise.sharding.config import Config
from shardwise.sharding.formats import NVFP4, Fp8, Packed4
from shardwise.sharding.latent import latent_rope
from shardwise.sharding.model import Extra, Layer, ModelSpec
from shardwise.sharding.mtp import replace_prefix
from shardwise.sharding.quantization import NamePatterns, Quantization
from shardwise.sharding.spec import Block, CompressedAttention, Moe, Routing

LAYER = "layers.{layer}"
W1_W3_W2 = ("w1", "w3", "w2")
FP8 = Fp8(block=(128, 128), scale="scale", scale_dtype="F8_E8M0")
FP4 = Packed4(32, "fp4", weight_dtype="I8", scale="scale", scale_dtype="F8_E8M0")


def build(config: Config, name: str, architecture: str) -> ModelSpec:
    b = Builder(config, name, architecture, prefix="", norm_eps=config.number("rms_norm_eps", default=1e-6))
    b.quantization = _storage(config)
    count = config.integer("num_hidden_layers")
    ratios = config.list("compress_ratios", default=[0] * count, of=int)[:count]
    hashed = config.integer("num_hash_layers", default=0, least=0)

    def layer(key: tuple[int, bool]) -> Layer:
        ratio, by_hash = key
        norms = ("attn_norm", "ffn_norm")
        return pre_norm_layer(
            b,
            _attention(b, config, ratio),
            _experts(b, config, by_hash),
            prefix=LAYER,
            norms=norms,
            others=_hyper(b, config),
        )

    keys = [(ratio, i < hashed) for i, ratio in enumerate(ratios)]
    if len(keys) != count:
        raise config.error(("compress_ratios",), ratios, f"at least {count} numbers, one a layer")
    multi = config.integer("hc_mult", default=1)
    ends = _hyper_head(b, multi, "hyper_head", "")
    _mtp(b, config, layer((_mtp_ratio(config, count), False)))
    return b.model(
        b.layers(layer, keys), embed_name="embed", head_name="head", final_norm_name="norm", others=(Block(ends),)
    )


def _hyper_head(b: Builder, multi: int, role: str, base: str) -> Tensors:
    """Joins the residual streams before a head."""
    parts = (("fn", (multi, multi * b.hidden_size)), ("base", (multi,)), ("scale", (1,)))
    return tuple(
        b.vector(f"{role}.{part}", f"{base}hc_head_{part}", *map(fixed, shape), dtype="F32") for part, shape in parts
    )


def _mtp_ratio(c: Config, count: int) -> int:
    """`compress_ratios` goes on with the MTP layer's where it is longer than the decoder."""
    more = c.list("compress_ratios", default=[], of=int)[count:]
    return more[0] if more else 0


def _mtp(b: Builder, c: Config, like: Layer) -> None:
    """MTP layers, each a decoder layer `like` behind two norms and two projections, with streams joined of its own."""
    count, base = c.integer("num_nextn_predict_layers", default=0, least=0), "mtp.{layer}"
    if not count:
        return
    tensors = tuple(replace_prefix(t, LAYER, base) for t in like.tensors)
    for part, norm in (("e", "enorm"), ("h", "hnorm")):
        tensors += b.linear(f"mtp.project_{part}", f"{base}.{part}_proj", b.hidden, b.hidden)
        tensors += (b.vector(f"mtp.{norm}.weight", f"{base}.{norm}.weight", b.hidden),)
    tensors += (b.vector("mtp.norm.weight", f"{base}.norm.weight", b.hidden),)
    tensors += _hyper_head(b, c.integer("hc_mult", default=1), "mtp.hyper_head", f"{base}.")
    b.extras.append(Extra(name="mtp", tensors=tensors, layers=tuple(range(count)), note="names inferred"))


def _storage(c: Config) -> Quantization:
    """FP8 blocks with power-of-two scales; experts in FP4, or in NVFP4 where ModelOpt converted them."""
    section = c.own("quantization_config")
    if not section.data:
        return Quantization()
    experts = NamePatterns(["*.ffn.experts.*"])
    if section.text("moe_quant_algo", default="") == "NVFP4":
        return Quantization("fp8 128x128 + nvfp4", FP8, chosen=((experts, NVFP4),))
    if c.text("expert_dtype", default="fp8") == "fp4":
        return Quantization("fp8 128x128 + fp4", FP8, chosen=((experts, FP4),))
    return Quantization("fp8 128x128", FP8)


def _attention(b: Builder, c: Config, ratio: int) -> CompressedAttention:
    heads, groups, d = c.integer("num_attention_heads"), c.integer("o_groups"), c.integer("head_dim")
    if heads % groups:
        raise c.error(("o_groups",), groups, f"a divisor of num_attention_heads {heads}")
    q_axis, o_axis = LogicalAxis(Axis.Q_HEADS, heads, groups), LogicalAxis(Axis.O_GROUPS, groups, groups)
    q_rank, o_rank, module = c.integer("q_lora_rank"), c.integer("o_lora_rank"), f"{LAYER}.attn"
    tensors = b.linear("q_a", f"{module}.wq_a", fixed(q_rank), b.hidden)
    tensors += (b.vector("q_a_norm.weight", f"{module}.q_norm.weight", fixed(q_rank)),)
    tensors += b.linear("q_b", f"{module}.wq_b", along(q_axis, d), fixed(q_rank))
    tensors += b.linear("kv", f"{module}.wkv", fixed(d), b.hidden)
    tensors += (b.vector("kv_norm.weight", f"{module}.kv_norm.weight", fixed(d)),)
    tensors += (b.vector("sinks", f"{module}.attn_sink", along(q_axis), dtype="F32"),)
    tensors += b.linear("o_a", f"{module}.wo_a", along(o_axis, o_rank), fixed(heads * d // groups))
    tensors += b.linear("o_b", f"{module}.wo_b", b.hidden, along(o_axis, o_rank))
    # Small ratios compress overlapping windows, two entries wide, and are searched by an indexer.
    indexed = 0 < ratio < 128
    if ratio:
        tensors += _compressor(b, f"{module}.compressor", "compress", ratio, d, 2 if indexed else 1)
    index = {}
    if indexed:
        n, di = c.integer("index_n_heads"), c.integer("index_head_dim")
        index = {"index_heads": n, "index_head_dim": di, "index_topk": c.integer("index_topk")}
        tensors += b.linear("index_q", f"{module}.indexer.wq_b", fixed(n * di), fixed(q_rank))
        tensors += b.linear("index_weights", f"{module}.indexer.weights_proj", fixed(n), b.hidden, plain=True)
        tensors += _compressor(b, f"{module}.indexer.compressor", "index_compress", ratio, di, 2)
    rope = latent_rope(b, c.integer("qk_rope_head_dim"))
    theta = c.number("compress_rope_theta", default=rope.theta) if ratio else rope.theta
    return CompressedAttention(
        tensors,
        q_axis=q_axis,
        o_axis=o_axis,
        head_dim=d,
        rope_dim=rope.dim,
        q_rank=q_rank,
        o_rank=o_rank,
        scale=d**-0.5,
        rope=replace(rope, theta=theta),
        window=c.integer("sliding_window"),
        compress_ratio=ratio,
        norm_eps=b.norm_eps,
        **index,
    )


def _compressor(b: Builder, module: str, role: str, ratio: int, dim: int, wide: int) -> Tensors:
    out: Dim = fixed(wide * dim)
    tensors = b.linear(f"{role}_kv", f"{module}.wkv", out, b.hidden, plain=True)
    tensors += b.linear(f"{role}_gate", f"{module}.wgate", out, b.hidden, plain=True)
    return (
        *tensors,
        b.vector(f"{role}.positions", f"{module}.ape", fixed(ratio), out, dtype="F32"),
        b.vector(f"{role}_norm.weight", f"{module}.norm.weight", fixed(dim)),
    )


def _experts(b: Builder, c: Config, by_hash: bool) -> Moe:
    experts, width, module = c.integer("n_routed_experts"), c.integer("moe_intermediate_size"), f"{LAYER}.ffn"
    top_k = c.integer("num_experts_per_tok", most=experts)
    limit = c.number("swiglu_limit", default=None)
    shared = c.integer("n_shared_experts", default=0, least=0)
    extra: Tensors = ()
    if by_hash:
        vocab = fixed(c.integer("vocab_size"))
        table = b.vector("router.table", f"{module}.gate.tid2eid", vocab, fixed(top_k), dtype="I64")
        extra = (replace(table, values=0, optional=True),)
    options: dict[str, Any] = {"names": W1_W3_W2, "limit": limit}
    return moe(
        b,
        module,
        experts,
        width,
        Routing(
            top_k=top_k,
            score=c.text("scoring_func", default="sqrtsoftplus"),
            normalize=c.flag("norm_topk_prob", default=True),
            bias_correction=not by_hash,
            scale=c.number("routed_scaling_factor", default=1.0),
            hash_layer=by_hash,
        ),
        correction=None if by_hash else "gate.bias",
        shared=dense_mlp(b, f"{module}.shared_experts", width * shared, role="shared.", **options) if shared else None,
        extra=extra,
        **options,
    )


def _hyper(b: Builder, c: Config) -> tuple[Block, ...]:
    """Hyper-connections around both halves of the layer: `hc_mult` residual streams, mixed in float32."""
    multi = c.integer("hc_mult", default=1)
    if multi == 1:
        return ()
    mixed = fixed((2 + multi) * multi)
    parts = (("fn", (mixed, fixed(multi * b.hidden_size))), ("base", (mixed,)), ("scale", (fixed(3),)))
    return tuple(
        Block(
            tuple(
                b.vector(f"hyper_{half}.{part}", f"{LAYER}.hc_{half}_{part}", *dims, dtype="F32")
                for part, dims in parts
            )
        )
        for half in ("attn", "ffn")
    )
