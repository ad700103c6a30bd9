"""Tiny checkpoints of every family that the runtime knows: Transformers' model type, and what its config differs in."""

FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama tied, biased, scaled rope": (
        "llama",
        dict(
            tie_word_embeddings=True,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=10000.0,
                factor=4.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        ),
    ),
    "mistral with a window": ("mistral", dict(sliding_window=5)),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", dict(attention_bias=False)),
}
MOE_FAMILIES: dict[str, tuple[str, dict]] = {
    "mixtral": ("mixtral", dict(num_local_experts=5, num_experts_per_tok=2)),
    "qwen2_moe": (
        "qwen2_moe",
        dict(
            num_experts=5,
            num_experts_per_tok=2,
            moe_intermediate_size=36,
            shared_expert_intermediate_size=40,
            norm_topk_prob=False,
        ),
    ),
    "qwen3_moe with a dense layer": (
        "qwen3_moe",
        dict(num_experts=7, num_experts_per_tok=3, moe_intermediate_size=36, norm_topk_prob=True, mlp_only_layers=[1]),
    ),
    "gpt_oss": (
        "gpt_oss",
        dict(
            seed=1,
            num_local_experts=5,
            num_experts_per_tok=2,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
}
FAMILIES |= MOE_FAMILIES
DELTA = dict(
    linear_num_key_heads=3,
    linear_num_value_heads=6,
    linear_key_head_dim=8,
    linear_value_head_dim=12,
    linear_conv_kernel_dim=4,
    layer_types=["linear_attention", "full_attention", "linear_attention"],
)
SHARED_EXPERT = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=36, shared_expert_intermediate_size=40)
QWEN3_5 = dict(
    DELTA,
    rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5, mrope_section=[2, 1, 1]),
    vision=dict(
        depth=1,
        hidden_size=16,
        num_heads=2,
        intermediate_size=32,
        out_hidden_size=48,
        num_position_embeddings=16,
        patch_size=4,
    ),
)
LATENT = dict(
    num_key_value_heads=6,
    head_dim=8,
    kv_lora_rank=24,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=16,
    n_routed_experts=6,
    n_shared_experts=1,
    moe_intermediate_size=36,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
)
ALTERNATING = dict(sliding_window=5, query_pre_attn_scalar=16)
NEAR_KIN: dict[str, tuple[str, dict]] = {
    "phi3": ("phi3", dict(pad_token_id=0, num_key_value_heads=2, head_dim=8)),
    "phi3 with long factors": (
        "phi3",
        dict(
            pad_token_id=0,
            head_dim=8,
            partial_rotary_factor=0.75,
            original_max_position_embeddings=64,
            rope_parameters=dict(
                rope_type="longrope",
                rope_theta=10000.0,
                partial_rotary_factor=0.75,
                original_max_position_embeddings=64,
                short_factor=[1.0, 1.5, 2.0],
                long_factor=[1.0, 2.0, 4.0],
            ),
        ),
    ),
    "llama with dynamic rope": (
        "llama",
        dict(rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0)),
    ),
    "smollm3": ("smollm3", dict(pad_token_id=0, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=5)),
    "granite": (
        "granite",
        dict(
            embedding_multiplier=12.0,
            attention_multiplier=0.1,
            residual_multiplier=0.22,
            logits_scaling=2.0,
            attention_bias=True,
            mlp_bias=True,
        ),
    ),
    "ernie4_5": ("ernie4_5", dict(use_bias=True)),
    "glm4": ("glm4", dict(pad_token_id=0)),
    "hunyuan": (
        "hunyuan_v1_dense",
        dict(rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, alpha=50.0, factor=1.0)),
    ),
    "gemma": ("gemma", {}),
    "gemma2": (
        "gemma2",
        dict(**ALTERNATING, layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    ),
    "gemma3": (
        "gemma3_text",
        dict(**ALTERNATING, layer_types=["sliding_attention", "sliding_attention", "full_attention"]),
    ),
    "deepseek_v3": (
        "deepseek_v3",
        dict(
            LATENT,
            q_lora_rank=20,
            n_group=2,
            topk_group=1,
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=10000.0,
                factor=4.0,
                original_max_position_embeddings=32,
                mscale=1.0,
                mscale_all_dim=0.8,
            ),
        ),
    ),
    "deepseek_v2": ("deepseek_v2", dict(LATENT, q_lora_rank=None, topk_method="greedy")),
    "qwen3_next": ("qwen3_next", dict(DELTA, **SHARED_EXPERT, partial_rotary_factor=0.5)),
    "qwen3_5": ("qwen3_5", QWEN3_5),
    "qwen3_5_moe": ("qwen3_5_moe", dict(QWEN3_5, **SHARED_EXPERT, seed=1)),
    "olmo2": ("olmo2", {}),
    "olmo3": (
        "olmo3",
        dict(sliding_window=5, layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    ),
    "olmoe": ("olmoe", dict(head_dim=8, num_experts=6, num_experts_per_tok=2)),
    "minimax_m2": ("minimax_m2", dict(num_local_experts=5, num_experts_per_tok=2, rotary_dim=8)),
    "cohere": ("cohere", dict(logit_scale=0.5)),
    "cohere2": (
        "cohere2",
        dict(
            logit_scale=4.0,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "starcoder2": ("starcoder2", dict(use_bias=True, sliding_window=5)),
    "glm4_moe": (
        "glm4_moe",
        dict(
            n_routed_experts=6,
            n_shared_experts=1,
            moe_intermediate_size=36,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            n_group=2,
            topk_group=1,
            partial_rotary_factor=0.5,
            use_qk_norm=True,
        ),
    ),
}
MAMBA = dict(
    head_dim=8,
    mamba_n_heads=12,
    mamba_d_head=8,
    mamba_d_state=8,
    mamba_d_conv=4,
    mamba_chunk_size=4,
)
NEAR_KIN |= {
    "bamba": ("bamba", dict(MAMBA, mamba_n_groups=1, attn_layer_indices=[1], mlp_bias=True)),
    "granite hybrid": (
        "granitemoehybrid",
        dict(
            MAMBA,
            mamba_n_groups=1,
            mamba_d_conv=3,
            mamba_proj_bias=True,
            num_local_experts=5,
            num_experts_per_tok=2,
            shared_intermediate_size=24,
            layer_types=["mamba", "attention", "mamba"],
            residual_multiplier=0.5,
        ),
    ),
    "falcon_h1": (
        "falcon_h1",
        dict(
            MAMBA,
            head_dim=8,
            num_hidden_layers=2,
            mamba_d_ssm=96,
            mamba_n_groups=2,
            projectors_bias=True,
            mamba_rms_norm=True,
            mamba_norm_before_gate=True,
            key_multiplier=0.5,
            attention_in_multiplier=0.9,
            attention_out_multiplier=0.8,
            ssm_in_multiplier=1.25,
            ssm_out_multiplier=0.7,
            ssm_multipliers=[0.5, 1.5, 0.8, 1.2, 0.9],
            mlp_multipliers=[0.9, 0.6],
            embedding_multiplier=2.0,
            lm_head_multiplier=0.5,
            mlp_bias=True,
            attention_bias=True,
        ),
    ),
    "mamba2": ("mamba2", dict(num_heads=12, head_dim=8, n_groups=1, state_size=8, chunk_size=4, use_bias=True)),
    "nemotron_h": (
        "nemotron_h",
        dict(
            layers_block_type=["mamba", "mlp", "mamba", "attention", "mlp"],
            num_hidden_layers=5,
            mamba_num_heads=8,
            mamba_head_dim=8,
            n_groups=2,
            ssm_state_size=8,
            conv_kernel=4,
            chunk_size=4,
        ),
    ),
    "nemotron_h with experts": (
        "nemotron_h",
        dict(
            layers_block_type=["mamba", "moe", "attention", "moe"],
            num_hidden_layers=4,
            mamba_num_heads=8,
            mamba_head_dim=8,
            n_groups=2,
            ssm_state_size=8,
            n_routed_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=20,
            moe_shared_expert_intermediate_size=24,
            moe_latent_size=16,
            n_group=2,
            topk_group=1,
        ),
    ),
}
"""Fused tensors, norms after blocks, capped scores, grouped routing, state-space layers: in few layouts, which the
others try out."""
