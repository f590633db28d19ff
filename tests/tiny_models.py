"""Small random checkpoints of many families, for tests: every field that makes a model large is made small."""

from typing import Any

VOCABULARY = 97
# Sizes by the names that configs use for them; a config takes those that it has.
SMALL: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "embed_dim", "word_embed_proj_dim", "emb_dim"], 32),
    **dict.fromkeys(["embedding_size", "embedding_dim", "hidden_size_global", "backbone_hidden_size", "n_ctx"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "dim_ff"], 48),
    **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim", "shared_intermediate_size"], 48),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_attention_heads", "n_head"], 4),
    **dict.fromkeys(["num_heads", "n_heads", "encoder_layers", "decoder_layers", "num_decoder_layers"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads", "num_decoder_attention_heads"], 4),
    **dict.fromkeys(["n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_experts_per_tok", "num_experts_per_token", "moe_topk"], 2),
    **dict.fromkeys(["zero_expert_num", "num_mem_blocks", "kv_n_heads"], 2),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"], 16),
    **dict.fromkeys(["shared_experts_intermediate_size", "router_hidden_size", "adapter_rank"], 16),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank"], 16),
    **dict.fromkeys(["head_dim", "qk_rope_head_dim", "v_head_dim", "dim_head", "d_kv"], 8),
    **dict.fromkeys(["n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "bos_token_id"], 1),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"], 256),
    "qk_nope_head_dim": 12,
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "sliding_window": 24,
    "attention_chunk_size": 32,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "layer_types": None,
    "mlp_layer_types": None,
    "layers_block_type": None,
    "mlp_only_layers": [],
}


def tiny_config(model_type: str, **own: Any) -> Any:
    """A small config of a family, with ``own`` fields over the common ones."""
    from transformers import CONFIG_MAPPING

    return _tiny(CONFIG_MAPPING[model_type], own)


def _tiny(config_class: Any, own: dict[str, Any]) -> Any:
    """A small config of this class and of the configs inside it; ``own`` goes to the text config where it has one."""
    default = config_class()
    fields = default.to_dict()
    optional = ("head_dim", "num_key_value_heads", "layer_types")
    small = {k: v for k, v in SMALL.items() if fields.get(k) is not None or (k in fields and k in optional)}
    if "kv_lora_rank" in fields:  # latent attention has as many KV heads as query heads, and its own head dims
        small["num_key_value_heads"] = 4
        small.pop("head_dim", None)
    if "text_config" in fields:
        small, own = {"text_config": _tiny(type(default.text_config), own)}, {}
    for name in config_class.sub_configs:
        if name != "text_config" and getattr(default, name, None) is not None and name not in own:
            small[name] = _tiny(type(getattr(default, name)), {})
    return config_class(**{**small, **own})


def save_tiny(folder: Any, config: Any, *, dtype: str = "float32", seed: int = 0, **saving: Any) -> None:
    """Save a random checkpoint whose attention is far from uniform."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(
                1.0 if weight.ndim == 1 else 0.0, 0.3 if weight.ndim == 1 else 1.2 * weight.shape[-1] ** -0.5
            )
    model.save_pretrained(folder, **saving)


def truth(folder: Any, token_ids: Any) -> Any:
    """Log-probabilities (T,) of one transformers process with its own plain attention; the first is NaN."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids_T = torch.from_numpy(token_ids.astype(np.int64))
    with torch.inference_mode():
        logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0].float()
    found = -torch.nn.functional.cross_entropy(logits_TV[:-1], ids_T[1:], reduction="none")
    return np.concatenate([[np.nan], found.numpy()])
