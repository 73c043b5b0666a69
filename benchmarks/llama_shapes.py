"""Llamas of three sizes with random weights, and how they are made in 4 bits on a small card.

A model is made layer by layer: each is drawn in bf16 where it will stay and quantised before the
next, so that no 16-bit copy of the whole ever exists.
"""

from typing import Any

COMMON = {
    "vocab_size": 128_256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "tie_word_embeddings": True,
    },
    "3B": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "tie_word_embeddings": True,
    },
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    # For a machine without a GPU: shows that the script runs.
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}


def shape_config(shape: str) -> Any:
    """The configuration of a shape."""
    from transformers import LlamaConfig

    return LlamaConfig(**{**COMMON, **SHAPES[shape]}, dtype="bfloat16")


def quantised_llama(shape: str, device: str) -> Any:
    """A Llama of this shape whose layers are in NF4 with nested scales, the rest in bf16."""
    import torch
    from transformers import BitsAndBytesConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    from transformers.quantizers import AutoHfQuantizer
    from transformers.utils.quantization_config import QuantizationMethod

    torch.manual_seed(0)
    config = shape_config(shape)
    layers = config.num_hidden_layers
    config.num_hidden_layers = 0
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    config.num_hidden_layers = layers
    for number in range(layers):
        with torch.device(device):
            layer = LlamaDecoderLayer(config, number).to(torch.bfloat16)
        _quantise_linears(layer, device)
        model.model.layers.append(layer)
    # What from_pretrained leaves on a model that it has quantised.
    config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model.is_quantized = model.is_loaded_in_4bit = True
    model.quantization_method = QuantizationMethod.BITS_AND_BYTES
    model.hf_quantizer = AutoHfQuantizer.from_config(config.quantization_config)
    return model


def _quantise_linears(layer: Any, device: str) -> None:
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, module in list(layer.named_modules()):
        if not isinstance(module, torch.nn.Linear):
            continue
        weight = torch.empty_like(module.weight).normal_(0.0, 0.02)
        with torch.device("meta"):
            quantised = Linear4bit(
                module.in_features, module.out_features, bias=False,
                compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4",
            )  # fmt: skip
        quantised.weight = Params4bit(
            weight, requires_grad=False, compress_statistics=True, quant_type="nf4"
        ).to(device)
        parent, _, own = name.rpartition(".")
        setattr(layer.get_submodule(parent), own, quantised)


def with_adapter(model: Any) -> Any:
    """LoRA r=16 on all linear layers of the trunk, and activation checkpointing."""
    import torch
    from peft import LoraConfig, get_peft_model

    model.requires_grad_(False)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"
    )
    model = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.02)
    # Trainers turn it on in train(), which is not called here.
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model
