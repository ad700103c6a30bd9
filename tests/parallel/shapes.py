"""Configs of tiny models as they are published, for tests that need no checkpoint."""

COMMON = dict(
    vocab_size=131,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=16,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
    torch_dtype="bfloat16",
)
LLAMA = COMMON | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 10000.0}
FP8 = LLAMA | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}
GPT_OSS = COMMON | {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "intermediate_size": 64,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_theta": 10000.0,
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    },
}
QWEN_MOE = COMMON | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 36,
    "norm_topk_prob": True,
    "rope_theta": 10000.0,
}
