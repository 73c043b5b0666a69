"""Tiny models of every family that packed rows were tried on, and why some must not use them."""

from typing import Any

from tiny_models import TOKENIZER, plain_rows, tiny_model

from lite_orpo.model.head import attach_scored_head
from lite_orpo.model.prefix_sharing import PrefixSharing, decide_prefix_sharing

WINDOW = {"sliding_window": 8}
_THREE_TO_ONE = {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
_FOUR_LAYERS = {"num_hidden_layers": 4}
_GEMMA = {"query_pre_attn_scalar": 8, **WINDOW}
_PER_LAYER = {"vocab_size_per_layer_input": len(TOKENIZER), "hidden_size_per_layer_input": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
_MIXED = {"layer_types": ["linear_attention", "full_attention"]}

EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen2 window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, **WINDOW}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral window": ("mistral", WINDOW),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3": ("gemma3_text", {**_GEMMA, **_FOUR_LAYERS, **_THREE_TO_ONE}),
    "gemma3n": (
        "gemma3n_text",
        {
            **WINDOW,
            **_FOUR_LAYERS,
            **_THREE_TO_ONE,
            **_PER_LAYER,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "gemma4": (
        "gemma4_text",
        {
            **WINDOW,
            **_FOUR_LAYERS,
            **_THREE_TO_ONE,
            **_PER_LAYER,
            "num_kv_shared_layers": 0,
            "global_head_dim": 8,
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "phi3": ("phi3", {}),
    "olmo3": ("olmo3", WINDOW),
    "cohere2": ("cohere2", WINDOW),
    "granite": ("granite", {}),
    "gpt_oss": ("gpt_oss", {**WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", _EXPERTS),
    "mixtral": (
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 24,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "head_dim": 4,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "gpt_neox": ("gpt_neox", {}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "exaone4": ("exaone4", WINDOW),
    "glm4": ("glm4", {}),
}

# Why the static rule refuses a family; what the probe alone finds on it.
REFUSED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}, "layers of type conv", "layers"),
    "qwen3_next": (
        "qwen3_next",
        {**_EXPERTS, **_LINEAR, **_MIXED, "shared_expert_intermediate_size": 24},
        "layers of type linear_attention",
        "layers",
    ),
    "qwen3_5": (
        "qwen3_5_text",
        {**_LINEAR, **_MIXED},
        "layers of type linear_attention",
        "layers",
    ),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}, "cannot be exchanged", "layers"),
    "mpt": (
        "mpt",
        {"d_model": 32, "n_heads": 4, "n_layers": 2},
        "cannot be exchanged",
        "does not run",
    ),
    "falcon": ("falcon", {"alibi": True}, "ALiBi", "does not run"),
    "falcon_h1": (
        "falcon_h1",
        {
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
        },
        "layers of type hybrid",
        "see the chosen ones",
    ),
    "llama4": (
        "llama4_text",
        {
            "attention_chunk_size": 8,
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 100,
            "moe_layers": [],
        },
        "layers of type chunked_attention",
        "differ",
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_expand": 2,
            "mamba_n_groups": 1,
            "num_local_experts": 0,
            "shared_intermediate_size": 48,
        },
        "layers of type",
        "layers",
    ),
    "mamba2": (
        "mamba2",
        {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
        "layers of type linear_attention",
        "layers",
    ),
    "jamba": (
        "jamba",
        {
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
        "layers of type linear_attention",
        "layers",
    ),
    "nemotron_h": (
        "nemotron_h",
        {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1},
        "layers of type",
        "layers",
    ),
}


def exact_model(family: str, **settings: Any) -> Any:
    """A model on which packed rows are exact."""
    name, own = EXACT[family]
    return tiny_model(name, **{**own, **settings})


def refused_model(family: str) -> Any:
    """A model on which they are not."""
    name, own, *_ = REFUSED[family]
    return tiny_model(name, **own)


def decide(model: Any, **settings: Any) -> PrefixSharing:
    """The decision for a model, its scored head attached for it."""
    head = attach_scored_head(model, backend="auto", workspace_bytes=2**20, device="cpu")
    head.verify()
    options = {"attention": "sdpa", "max_length": 64, **settings}
    return decide_prefix_sharing(model, **options)


def longer_rows(count: int) -> list[dict[str, str]]:
    """Prompts and completions beyond the families' windows of 8."""
    return [
        {**row, "prompt": row["prompt"] + "and then some more " * (i % 3)}
        for i, row in enumerate(plain_rows(count))
    ]
