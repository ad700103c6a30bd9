"""Tiny random models of many families, written by Transformers."""

BASE = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 60,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
LATENT = {
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "num_key_value_heads": 6,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "moe_intermediate_size": 20,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
SHARED = {"shared_expert_intermediate_size": 24}
MAMBA = {
    "mamba_n_heads": 12,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
}

MODELS = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied-biased": (
        "LlamaForCausalLM",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ("MistralForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {"attention_bias": False}),  # which it does not heed
    "smollm3": ("SmolLM3ForCausalLM", {"pad_token_id": 0}),
    "granite": ("GraniteForCausalLM", {"mlp_bias": True, "attention_bias": True}),
    "ernie-4.5": ("Ernie4_5ForCausalLM", {"use_bias": True}),
    "glm-4": ("Glm4ForCausalLM", {"pad_token_id": 0}),
    "hunyuan": ("HunYuanDenseV1ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "phi3": ("Phi3ForCausalLM", {"num_attention_heads": 4, "head_dim": 8, "pad_token_id": 0}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", {**MOE, **SHARED, "num_attention_heads": 4, "decoder_sparse_step": 1}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {**MOE, "mlp_only_layers": [0]}),
    "qwen3-next": ("Qwen3NextForCausalLM", {**MOE, **SHARED, **DELTA, "partial_rotary_factor": 0.5}),
    "gpt-oss": (
        "GptOssForCausalLM",
        {"num_local_experts": 6, "num_experts_per_tok": 2, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "olmo2": ("Olmo2ForCausalLM", {"num_attention_heads": 4}),
    "olmoe": (
        "OlmoeForCausalLM",
        {"head_dim": None, "num_experts": 6, "num_experts_per_tok": 2},
    ),
    "gemma2": ("Gemma2ForCausalLM", {}),
    "gemma3": ("Gemma3ForCausalLM", {}),
    "deepseek-v3": ("DeepseekV3ForCausalLM", LATENT),
    "deepseek-v2-lite": (
        "DeepseekV2ForCausalLM",
        {**LATENT, "q_lora_rank": None, "topk_method": "greedy", "n_group": 1},
    ),
    "deepseek-v3.2": ("DeepseekV32ForCausalLM", {**LATENT, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4}),
    "glm-4.5": (
        "Glm4MoeForCausalLM",
        {**LATENT, "num_key_value_heads": 2, "attention_bias": True, "use_qk_norm": True, "qk_nope_head_dim": None},
    ),
    "minimax-m2": ("MiniMaxM2ForCausalLM", {"num_local_experts": 6, "num_experts_per_tok": 2, "rotary_dim": 4}),
    "granite-hybrid": (
        "GraniteMoeHybridForCausalLM",
        {
            **MAMBA,
            "num_attention_heads": 4,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 24,
            "layer_types": ["mamba", "attention"],
        },
    ),
    "bamba": ("BambaForCausalLM", {**MAMBA, "num_attention_heads": 4, "attn_layer_indices": [1], "head_dim": None}),
    "falcon-h1": ("FalconH1ForCausalLM", {**MAMBA, "mamba_d_ssm": 96, "num_attention_heads": 4}),
    "nemotron-h": (
        "NemotronHForCausalLM",
        {
            "layers_block_type": ["mamba", "attention", "moe", "mlp"],
            "num_hidden_layers": 4,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "ssm_state_size": 8,
            "conv_kernel": 4,
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "moe_shared_expert_intermediate_size": 24,
            "moe_latent_size": 16,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "mamba2": (
        "Mamba2ForCausalLM",
        {"num_heads": 12, "head_dim": 8, "n_groups": 3, "state_size": 8, "tie_word_embeddings": True},
    ),
    "starcoder2": ("Starcoder2ForCausalLM", {"num_attention_heads": 4}),
    "cohere": ("CohereForCausalLM", {"num_attention_heads": 4}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}),
    "gpt-bigcode": ("GPTBigCodeForCausalLM", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}),
    "mimo-v2": (
        "MiMoV2FlashForCausalLM",
        {
            **LATENT,
            "n_shared_experts": None,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "v_head_dim": 6,
            "num_attention_heads": 8,
            "swa_num_attention_heads": 8,
            "swa_num_key_value_heads": 4,
            "swa_head_dim": 8,
            "swa_v_head_dim": 6,
            "hybrid_layer_pattern": [0, 1],
            "moe_layer_freq": [0, 1],
            "n_group": 1,
        },
    ),
    "gemma4": (
        "Gemma4ForConditionalGeneration",
        {
            "text_config": {
                **BASE,
                "global_head_dim": 16,
                "num_global_key_value_heads": 1,
                "attention_k_eq_v": True,
                "enable_moe_block": True,
                "num_experts": 6,
                "top_k_experts": 2,
                "moe_intermediate_size": 20,
                "layer_types": ["sliding_attention", "full_attention"],
                "hidden_size_per_layer_input": 0,
                "vocab_size_per_layer_input": 96,
                "num_kv_shared_layers": 0,
            },
            "vision_config": None,
            "audio_config": None,
        },
    ),
    "llama4": (
        "Llama4ForConditionalGeneration",
        {
            "text_config": {
                **BASE,
                "intermediate_size_mlp": 40,
                "num_local_experts": 6,
                "num_experts_per_tok": 1,
                "interleave_moe_layer_step": 2,
            },
            "vision_config": {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 64,
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
                "image_size": 28,
                "patch_size": 14,
            },
        },
    ),
    "qwen3.5-moe": (
        "Qwen3_5MoeForConditionalGeneration",
        {
            "text_config": {
                **BASE,
                **MOE,
                **SHARED,
                **DELTA,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                    "mrope_section": [1, 1, 0],
                },
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "num_heads": 2,
                "intermediate_size": 32,
                "out_hidden_size": 48,
                "num_position_embeddings": 16,
                "patch_size": 4,
            },
        },
    ),
    "qwen3-vl": (
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": {
                **BASE,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "num_heads": 2,
                "intermediate_size": 32,
                "out_hidden_size": 48,
                "num_position_embeddings": 16,
                "patch_size": 4,
                "deepstack_visual_indexes": [0],
            },
        },
    ),
    "kimi-linear": (
        "KimiLinearForCausalLM",
        {
            **LATENT,
            "num_hidden_layers": 2,
            "n_group": 1,
            "num_experts": 6,
            "num_shared_experts": 1,
            "num_experts_per_token": 2,
            "pad_token_id": 0,
            "linear_attn_config": {
                "kda_layers": [1],
                "full_attn_layers": [2],
                "num_heads": 4,
                "head_dim": 8,
                "short_conv_kernel_size": 4,
            },
        },
    ),
}
"""Name -> (Transformers class, config fields over BASE)."""


def write(name: str, folder, **changes) -> None:
    """Write the model `name` with random float32 weights to `folder`. `changes`: of its text decoder's config."""
    import torch
    import transformers

    architecture, fields = MODELS[name]
    cls = getattr(transformers, architecture, None) or _unlisted(architecture)
    torch.manual_seed(0)
    if "text_config" in fields:
        merged = fields | {"text_config": fields["text_config"] | changes}
    else:
        merged = {"vocab_size": 96, **({} if "n_embd" in fields else BASE), **fields, **changes}
    config = cls.config_class.from_dict({k: v for k, v in merged.items() if v is not None})
    model = cls(config).float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)


def _unlisted(architecture: str):
    from transformers.models.kimi_linear import modeling_kimi_linear

    return getattr(modeling_kimi_linear, architecture)
