"""Vision towers as extras: tensors by tower type, so that a config alone tells their bytes.

A tower of another type is listed without tensors; its bytes are then known only from headers.
"""

from collections.abc import Callable, Iterator
from math import prod

from shardwise.sharding.axes import fixed
from shardwise.sharding.config import Config
from shardwise.sharding.model import Extra
from shardwise.sharding.tensors import TensorSpec

Row = tuple[str, tuple[int, ...]]
Tower = Callable[[Config, int], tuple[list[Row], list[Row], int]]
"""(vision_config, text hidden size) -> tensors outside of the layers, those of a layer, and the number of layers."""


def vision_extras(config: Config, hidden: int, dtype: str) -> Iterator[Extra]:
    """The vision part that a config announces, in the model's storage type."""
    vision = config.own("vision_config")
    if not vision.data:
        return
    kind = vision.text("model_type", default="")
    tower = TOWERS.get(kind) or TOWERS.get(kind.removesuffix("_vision"))
    tower = tower or (_kimi if vision.has("vt_hidden_size") and not vision.has("norm_type") else None)
    if tower is None:
        yield Extra(name="vision", note=f"tower type {kind or 'unnamed'}: bytes are known from headers only")
        return
    ends, layer, depth = tower(vision, hidden)
    yield Extra(name="vision", tensors=tuple(_tensor(row, dtype) for row in ends))
    yield Extra(name="vision", tensors=tuple(_tensor(row, dtype) for row in layer), layers=tuple(range(depth)))


def _tensor(row: Row, dtype: str) -> TensorSpec:
    name, shape = row
    return TensorSpec("vision", name, tuple(fixed(n) for n in shape), dtype)


def linear(name: str, out: int, inner: int) -> list[Row]:
    """A linear layer with bias."""
    return [(f"{name}.weight", (out, inner)), (f"{name}.bias", (out,))]


def norm(name: str, width: int) -> list[Row]:
    """A layer norm with bias."""
    return [(f"{name}.weight", (width,)), (f"{name}.bias", (width,))]


def _qwen(v: Config, _: int) -> tuple[list[Row], list[Row], int]:
    h, inner, out = v.integer("hidden_size"), v.integer("intermediate_size"), v.integer("out_hidden_size")
    patch, merged = v.integer("patch_size"), h * v.integer("spatial_merge_size", default=2) ** 2
    window = (v.integer("in_channels", default=3), v.integer("temporal_patch_size", default=2), patch, patch)
    base = "model.visual"
    ends = [(f"{base}.patch_embed.proj.weight", (h, *window)), (f"{base}.patch_embed.proj.bias", (h,))]
    ends += [(f"{base}.pos_embed.weight", (v.integer("num_position_embeddings"), h))]
    mergers = [(f"{base}.merger", h)]
    stacked = len(v.list("deepstack_visual_indexes", default=[], of=int))
    mergers += [(f"{base}.deepstack_merger_list.{i}", merged) for i in range(stacked)]
    for merger, width in mergers:
        ends += norm(f"{merger}.norm", width)
        ends += linear(f"{merger}.linear_fc1", merged, merged) + linear(f"{merger}.linear_fc2", out, merged)
    block = f"{base}.blocks.{{layer}}"
    layer = norm(f"{block}.norm1", h) + norm(f"{block}.norm2", h)
    layer += linear(f"{block}.attn.qkv", 3 * h, h) + linear(f"{block}.attn.proj", h, h)
    layer += linear(f"{block}.mlp.linear_fc1", inner, h) + linear(f"{block}.mlp.linear_fc2", h, inner)
    return ends, layer, v.integer("depth")


def _transformer_layer(block: str, h: int, inner: int, norms: tuple[str, str], out: str) -> list[Row]:
    """Of CLIP's shape: two norms, projections of attention with biases, two of the MLP."""
    layer = norm(f"{block}.{norms[0]}", h) + norm(f"{block}.{norms[1]}", h)
    for name in ("q_proj", "k_proj", "v_proj", out):
        layer += linear(f"{block}.self_attn.{name}", h, h)
    return layer + linear(f"{block}.mlp.fc1", inner, h) + linear(f"{block}.mlp.fc2", h, inner)


def _clip(v: Config, hidden: int) -> tuple[list[Row], list[Row], int]:
    """MiniMax M3."""
    h, inner, patch = v.integer("hidden_size"), v.integer("intermediate_size"), v.integer("patch_size")
    merge = v.own("img_token_compression_config")
    window = (v.integer("num_channels", default=3), merge.integer("temporal_patch_size", default=2), patch, patch)
    base = "vision_tower.vision_model"
    wide = hidden * merge.integer("spatial_merge_size", default=2) ** 2
    ends = [(f"{base}.embeddings.patch_embedding.weight", (h, *window)), *norm(f"{base}.pre_layrnorm", h)]
    ends += linear("multi_modal_projector.linear_1", hidden, h) + linear(
        "multi_modal_projector.linear_2", hidden, hidden
    )
    ends += linear("patch_merge_mlp.linear_1", hidden, wide) + linear("patch_merge_mlp.linear_2", hidden, hidden)
    layer = _transformer_layer(f"{base}.encoder.layers.{{layer}}", h, inner, ("layer_norm1", "layer_norm2"), "out_proj")
    return ends, layer, v.integer("num_hidden_layers")


def _kimi(v: Config, hidden: int) -> tuple[list[Row], list[Row], int]:
    """MoonViT of Kimi K2.5."""
    h, inner, patch = v.integer("vt_hidden_size"), v.integer("vt_intermediate_size"), v.integer("patch_size")
    grid = (v.integer("init_pos_emb_height"), v.integer("init_pos_emb_width"))
    merged = v.integer("mm_hidden_size", default=h) * prod(v.list("merge_kernel_size", default=[2, 2], of=int))
    base = "vision_tower"
    ends = [(f"{base}.patch_embed.proj.weight", (h, 3, patch, patch)), (f"{base}.patch_embed.proj.bias", (h,))]
    ends += [(f"{base}.patch_embed.pos_emb.weight", (*grid, h)), *norm(f"{base}.encoder.final_layernorm", h)]
    ends += norm("mm_projector.pre_norm", v.integer("mm_hidden_size", default=h))
    ends += linear("mm_projector.proj.0", merged, merged) + linear("mm_projector.proj.2", hidden, merged)
    block = f"{base}.encoder.blocks.{{layer}}"
    layer = norm(f"{block}.norm0", h) + norm(f"{block}.norm1", h)
    layer += linear(f"{block}.wqkv", 3 * h, h) + linear(f"{block}.wo", h, h)
    layer += linear(f"{block}.mlp.fc0", inner, h) + linear(f"{block}.mlp.fc1", h, inner)
    return ends, layer, v.integer("vt_num_hidden_layers")


def _pixtral(v: Config, hidden: int) -> tuple[list[Row], list[Row], int]:
    """Mistral 3."""
    h, inner, patch = v.integer("hidden_size"), v.integer("intermediate_size"), v.integer("patch_size")
    base, project = "vision_tower", "multi_modal_projector"
    ends: list[Row] = [(f"{base}.patch_conv.weight", (h, v.integer("num_channels", default=3), patch, patch))]
    ends += [(f"{base}.ln_pre.weight", (h,)), (f"{project}.norm.weight", (h,))]
    ends += [(f"{project}.patch_merger.merging_layer.weight", (h, 4 * h))]
    ends += [(f"{project}.linear_1.weight", (hidden, h)), (f"{project}.linear_2.weight", (hidden, hidden))]
    block = f"{base}.transformer.layers.{{layer}}"
    layer: list[Row] = [(f"{block}.attention.{x}_proj.weight", (h, h)) for x in "qkvo"]
    layer += [(f"{block}.feed_forward.{x}_proj.weight", (inner, h)) for x in ("gate", "up")]
    layer += [(f"{block}.feed_forward.down_proj.weight", (h, inner))]
    layer += [(f"{block}.{x}_norm.weight", (h,)) for x in ("attention", "ffn")]
    return ends, layer, v.integer("num_hidden_layers")


def _gemma4(v: Config, hidden: int) -> tuple[list[Row], list[Row], int]:
    h, inner, d = v.integer("hidden_size"), v.integer("intermediate_size"), v.integer("head_dim")
    heads, base = v.integer("num_attention_heads"), "model.vision_tower"
    patch = 3 * v.integer("patch_size") ** 2
    ends: list[Row] = [(f"{base}.patch_embedder.input_proj.weight", (h, patch))]
    table = (2, v.integer("position_embedding_size"), h)
    ends += [(f"{base}.patch_embedder.position_embedding_table", table)]
    ends += [("model.embed_vision.embedding_projection.weight", (hidden, h))]
    block = f"{base}.encoder.layers.{{layer}}"
    layer: list[Row] = [(f"{block}.self_attn.{x}_proj.linear.weight", (heads * d, h)) for x in "qkv"]
    layer += [(f"{block}.self_attn.o_proj.linear.weight", (h, heads * d))]
    layer += [(f"{block}.self_attn.{x}_norm.weight", (d,)) for x in "qk"]
    layer += [(f"{block}.mlp.{x}_proj.linear.weight", (inner, h)) for x in ("gate", "up")]
    layer += [(f"{block}.mlp.down_proj.linear.weight", (h, inner))]
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    layer += [(f"{block}.{x}_layernorm.weight", (h,)) for x in norms]
    return ends, layer, v.integer("num_hidden_layers")


def _siglip(v: Config, hidden: int) -> tuple[list[Row], list[Row], int]:
    """Gemma 3."""
    h, inner, patch = v.integer("hidden_size"), v.integer("intermediate_size"), v.integer("patch_size")
    base, project = "vision_tower.vision_model", "multi_modal_projector"
    patches = (v.integer("image_size") // patch) ** 2
    window = (h, v.integer("num_channels", default=3), patch, patch)
    ends: list[Row] = [(f"{base}.embeddings.patch_embedding.weight", window)]
    ends += [(f"{base}.embeddings.patch_embedding.bias", (h,))]
    ends += [(f"{base}.embeddings.position_embedding.weight", (patches, h)), *norm(f"{base}.post_layernorm", h)]
    ends += [(f"{project}.mm_input_projection_weight", (h, hidden)), (f"{project}.mm_soft_emb_norm.weight", (h,))]
    layer = _transformer_layer(f"{base}.encoder.layers.{{layer}}", h, inner, ("layer_norm1", "layer_norm2"), "out_proj")
    return ends, layer, v.integer("num_hidden_layers")


def _llama4(v: Config, hidden: int) -> tuple[list[Row], list[Row], int]:
    h, inner, patch = v.integer("hidden_size"), v.integer("intermediate_size"), v.integer("patch_size")
    wide, out = v.integer("projector_input_dim"), v.integer("projector_output_dim")
    base, places = "vision_model", (v.integer("image_size") // patch) ** 2 + 1
    pixels = v.integer("num_channels", default=3) * patch**2
    ends: list[Row] = [(f"{base}.class_embedding", (h,)), (f"{base}.positional_embedding_vlm", (places, h))]
    ends += [(f"{base}.patch_embedding.linear.weight", (h, pixels))]
    ends += norm(f"{base}.layernorm_pre", h) + norm(f"{base}.layernorm_post", h)
    merged = int(h / v.fraction("pixel_shuffle_ratio", default=0.5) ** 2)
    ends += [(f"{base}.vision_adapter.mlp.fc1.weight", (wide, merged))]
    ends += [(f"{base}.vision_adapter.mlp.fc2.weight", (out, wide))]
    ends += [("multi_modal_projector.linear_1.weight", (hidden, v.integer("vision_output_dim", default=out)))]
    norms = ("input_layernorm", "post_attention_layernorm")
    layer = _transformer_layer(f"{base}.model.layers.{{layer}}", h, inner, norms, "o_proj")
    return ends, layer, v.integer("num_hidden_layers")


TOWERS: dict[str, Tower] = {
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), _qwen),
    "clip_vision_model": _clip,
    "pixtral": _pixtral,
    "gemma4_vision": _gemma4,
    "siglip_vision_model": _siglip,
    "llama4_vision_model": _llama4,
}
"""By the `model_type` of the vision config, which may end in `_vision` beside."""
