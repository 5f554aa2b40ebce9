"""Tiny models of many families of transformers, from configs alone: each with a window and a rotation's switch within
64 tokens.

Weights are drawn from a seed; `spread` is their standard deviation, 0.02 as fresh weights usually have it, or wide,
so that attention is peaked and whatever is left out shows."""

from __future__ import annotations

from typing import Any

VOCAB_SIZE = 320
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FEW: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 2}
_GPT: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "n_embd": 64, "n_head": 4, "n_positions": 512}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
_STATES = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
_DELTA_NET: dict[str, Any] = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 64,
    "factor": 8.0,
}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
_WINDOW = {"sliding_window": 32}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, **_WINDOW}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("apertus", _SIZES),
    "arcee": ("arcee", _SIZES),
    "bamba": ("bamba", _SIZES | _STATES | {"attn_layer_indices": [1, 3], "mamba_expand": 2}),
    "bloom": ("bloom", {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "cohere": ("cohere", _SIZES),
    "cohere2": ("cohere2", _SIZES | _WINDOW),
    "ctrl": ("ctrl", _GPT | {"n_layer": 2, "dff": 96}),
    "deepseek_v3": (
        "deepseek_v3",
        _SIZES
        | _EXPERTS
        | {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "q_lora_rank": 32}
        | {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "n_shared_experts": 1},
    ),
    "doge": ("doge", _SIZES | _WINDOW),
    "ernie4_5": ("ernie4_5", _SIZES),
    "exaone4": ("exaone4", _SIZES | _WINDOW | {"sliding_window_pattern": 2}),
    "falcon": ("falcon", _FEW | {"num_attention_heads": 4}),
    "falcon_h1": ("falcon_h1", _SIZES | _STATES | {"mamba_d_ssm": 128}),
    "gemma": ("gemma", _SIZES | {"head_dim": 16}),
    "gemma2": ("gemma2", _SIZES | _GEMMA | {"attn_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", _SIZES | _GEMMA),
    "gemma3n": (
        "gemma3n_text",
        _SIZES
        | _GEMMA
        | {"layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 8}
        | {"vocab_size_per_layer_input": VOCAB_SIZE, "num_kv_shared_layers": 2, "laurel_rank": 8, "altup_num_inputs": 2}
        | {"activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "intermediate_size": [96] * 4},
    ),
    "glm4": ("glm4", _SIZES | {"head_dim": 16}),
    "gpt2": ("gpt2", _GPT | {"n_layer": 3}),
    "gpt_neo": (
        "gpt_neo",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 512}
        | {"attention_types": [[["global", "local"], 1]], "window_size": 32},
    ),
    "gpt_neox": ("gpt_neox", _SIZES),
    "gpt_oss": ("gpt_oss", _SIZES | _WINDOW | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gptj": ("gptj", _GPT | {"n_layer": 2, "rotary_dim": 8}),
    "granite": ("granite", _SIZES),
    "granitemoe": ("granitemoe", _SIZES | _EXPERTS),
    "granitemoehybrid": (
        "granitemoehybrid",
        _SIZES
        | _EXPERTS
        | _STATES
        | {"layer_types": ["mamba", "attention"] * 2, "mamba_expand": 2, "shared_intermediate_size": 64},
    ),
    "hrm_text": ("hrm_text", _SIZES | {"num_hidden_layers": 1, "H_cycles": 1, "L_cycles": 2, "prefix_lm": False}),
    "jamba": (
        "jamba",
        _SIZES
        | {"num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
        | {"mamba_d_state": 8, "use_mamba_kernels": False},
    ),
    "lfm2": ("lfm2", _SIZES | {"layer_types": ["conv", "conv", "full_attention", "conv"]}),
    "llama": ("llama", _SIZES),
    "llama4": (
        "llama4_text",
        _SIZES
        | {"head_dim": 16, "intermediate_size_mlp": 96, "num_local_experts": 4, "attention_chunk_size": 32}
        | {"layer_types": ["chunked_attention"] * 3 + ["full_attention"], "no_rope_layers": [1, 1, 1, 0]},
    ),
    "llama_dynamic": ("llama", _SIZES | {"max_position_embeddings": 64, "rope_parameters": _DYNAMIC}),
    "mamba": ("mamba", _FEW | {"state_size": 8}),
    "mamba2": ("mamba2", _FEW | {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "expand": 2}),
    "ministral": ("ministral", _SIZES | _WINDOW | {"head_dim": 16}),
    "mistral": ("mistral", _SIZES | _WINDOW),
    "mixtral": ("mixtral", _SIZES | _EXPERTS | _WINDOW),
    "moshi": ("moshi", _SIZES | _WINDOW | {"head_dim": 16, "ffn_dim": 96, "audio_vocab_size": 8, "num_codebooks": 2}),
    "mpt": ("mpt", {"vocab_size": VOCAB_SIZE, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}),
    "nemotron": ("nemotron", _SIZES),
    "olmo2": ("olmo2", _SIZES),
    "olmo3": ("olmo3", _SIZES | _WINDOW),
    "olmoe": ("olmoe", _SIZES | _EXPERTS),
    "opt": (
        "opt",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"max_position_embeddings": 512, "word_embed_proj_dim": 64},
    ),
    "phi": ("phi", _SIZES),
    "phi3": ("phi3", _SIZES | _WINDOW),
    "phi3_longrope": ("phi3", _SIZES | {"original_max_position_embeddings": 64, "rope_parameters": _LONGROPE}),
    "phimoe": ("phimoe", _SIZES | _WINDOW | {"num_local_experts": 4}),
    "qwen2": ("qwen2", _SIZES | _WINDOW | {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen2_moe": ("qwen2_moe", _SIZES | _EXPERTS | _WINDOW | {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen3": ("qwen3", _SIZES | {"head_dim": 16}),
    "qwen3_5": ("qwen3_5_text", _SIZES | _DELTA_NET),
    "qwen3_moe": ("qwen3_moe", _SIZES | _EXPERTS | {"head_dim": 16}),
    "qwen3_next": ("qwen3_next", _SIZES | _EXPERTS | _DELTA_NET),
    "recurrent_gemma": ("recurrent_gemma", _SIZES | {"head_dim": 16, "attention_window_size": 32, "lru_width": 64}),
    "rwkv": ("rwkv", _FEW | {"attention_hidden_size": 64, "intermediate_size": 96, "context_length": 512}),
    "seed_oss": ("seed_oss", _SIZES | {"head_dim": 16}),
    "smollm3": ("smollm3", _SIZES),
    "stablelm": ("stablelm", _SIZES),
    "starcoder2": ("starcoder2", _SIZES | _WINDOW),
    "whisper": (
        "whisper",
        {"vocab_size": VOCAB_SIZE, "d_model": 64, "decoder_layers": 2, "encoder_layers": 2, "pad_token_id": 0}
        | {"decoder_attention_heads": 4, "encoder_attention_heads": 4, "decoder_ffn_dim": 96, "encoder_ffn_dim": 96}
        | {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "max_target_positions": 512},
    ),
    "vaultgemma": ("vaultgemma", _SIZES | _GEMMA | {"attn_logit_softcapping": 5.0}),
}
"""Name -> (model type, config)."""


def make_family(name: str, *, spread: float = 0.02, attention: str = "eager", **changes: Any) -> Any:
    """Return a float32 causal language model of the family, in evaluation mode."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind, settings = FAMILIES[name]
    scale = {"init_std" if kind in ("opt", "whisper") else "initializer_range": spread}
    config = CONFIG_MAPPING[kind](**{**settings, **scale, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
