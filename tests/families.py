"""The families whose parity is tested, and what is special in each: the rows of docs/models.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).resolve().parent.parent / "docs" / "models.md"
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 8.0],
}  # fmt: skip
PHIMOE = {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3}


class Family(NamedTuple):
    """A family of models: its name, transformers' model type, what is special, and config fields for the test."""

    name: str
    model_type: str
    special: str
    own: dict[str, Any] = {}  # noqa: RUF012


FAMILIES = [
    Family("Llama 3", "llama", "llama3 rope scaling, grouped KV heads", {"rope_parameters": LLAMA3}),
    Family("Llama, dynamic NTK", "llama", "frequencies depend on the document's length",
           {"rope_parameters": DYNAMIC, "max_position_embeddings": 64}),
    Family("Llama 4", "llama4_text", "chunked attention, layers without rotary embedding, experts"),
    Family("Mistral", "mistral", "sliding window"),
    Family("Ministral 3", "ministral3", "yarn, scale that grows with the position"),
    Family("Mixtral", "mixtral", "experts"),
    Family("Qwen2", "qwen2", "biases, windows from one layer on",
           {"use_sliding_window": True, "max_window_layers": 2}),
    Family("Qwen2-MoE", "qwen2_moe", "experts, shared expert"),
    Family("Qwen3", "qwen3", "query and key norms, yarn", {"rope_parameters": YARN}),
    Family("Qwen3-MoE", "qwen3_moe", "experts, query and key norms"),
    Family("Phi", "phi", "parallel residual, partial rotary"),
    Family("Phi-3", "phi3", "longrope, fused projections",
           {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    Family("Phi-3.5-MoE", "phimoe", "longrope with scales, experts",
           {"rope_parameters": PHIMOE, "original_max_position_embeddings": 64}),
    Family("Gemma", "gemma", "scaled embeddings, tied head"),
    Family("Gemma 2", "gemma2", "soft caps of scores and logits, alternating windows"),
    Family("Gemma 3", "gemma3_text", "windows in five of six layers, two rotary bases", {"num_hidden_layers": 6}),
    Family("Gemma 3, multimodal", "gemma3", "nested text config, text only", {"num_hidden_layers": 6}),
    Family("Gemma 4", "gemma4_text", "head dims that differ by layer, per-layer inputs", {"num_hidden_layers": 6}),
    Family("OLMo 2", "olmo2", "norms after the blocks"),
    Family("OLMo 3", "olmo3", "alternating windows"),
    Family("gpt-oss", "gpt_oss", "attention sinks, alternating windows, experts"),
    Family("DeepSeek V2", "deepseek_v2", "latent attention, complex rotary, experts",
           {"num_experts_per_tok": 2, "topk_method": "greedy"}),
    Family("DeepSeek V3", "deepseek_v3", "latent attention with unequal head dims, experts"),
    Family("GLM-4.5", "glm4_moe", "partial rotary, experts"),
    Family("Cohere", "cohere", "parallel residual, logit scale, interleaved rotary"),
    Family("Cohere 2", "cohere2", "windows with rotary, full layers without"),
    Family("Granite", "granite", "scales of embeddings, scores, residuals and logits",
           {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
            "logits_scaling": 2.0}),
    Family("Granite MoE", "granitemoe", "experts in one weight"),
    Family("GPT-2", "gpt2", "learned positions, Conv1D weights"),
    Family("GPT-NeoX", "gpt_neox", "parallel residual, partial rotary, fused projections"),
    Family("GPT-BigCode", "gpt_bigcode", "one KV head"),
    Family("OPT", "opt", "learned positions with an offset, a decoder inside the decoder"),
    Family("StarCoder 2", "starcoder2", "biases, window"),
    Family("StableLM", "stablelm", "partial rotary, layer norms"),
    Family("SmolLM3", "smollm3", "layers without rotary embedding"),
    Family("MiniCPM 3", "minicpm3", "latent attention, scales"),
    Family("Differential Llama", "diffllama", "two attentions a layer"),
]  # fmt: skip

# Encoders, and the decoders of encoder-decoders, as language models.
DECODER = {"is_decoder": True, "is_encoder_decoder": False, "add_cross_attention": False}

# Model type, config fields, and why it is refused; `tests.sweep` has all others.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3_next", {}, "layers of type linear_attention"),
    ("mamba", {"num_hidden_layers": 2}, "layers of type linear_attention"),
    ("minimax", {"layer_types": ["linear_attention"] * 2 + ["full_attention"] * 2}, "layers of type linear_attention"),
    ("recurrent_gemma", {}, "layers of type linear_attention"),
    ("rwkv", {"num_hidden_layers": 2}, "does not use transformers' attention interface"),
    ("bloom", {}, "computes with its attention mask by itself"),
    ("inkling_text", {}, "position_bias"),
    ("deepseek_v32", {}, "computes with its attention mask by itself"),
    ("falcon", {}, "cannot be made with cpmpi's attention"),
    ("bart", DECODER, "does not count positions as 0, 1, 2, ..."),
    ("roberta", DECODER, "does not count positions as 0, 1, 2, ..."),
    ("t5", {"num_layers": 2}, "encoder-decoder"),
    ("bert", {}, "not causal"),
]


# Families whose ranks cannot share the weights: no plan, or one that needs other messages than two sums a layer.
UNSHARED = {
    "Llama 4", "Phi-3", "Phi-3.5-MoE", "OLMo 2", "OLMo 3", "gpt-oss", "DeepSeek V2", "DeepSeek V3", "Granite MoE",
    "GPT-2", "GPT-BigCode", "OPT", "StableLM", "MiniCPM 3", "Differential Llama",
}  # fmt: skip


def table() -> str:
    """The table of docs/models.md."""
    lines = ["| family | model type | special in it | `--tp` |", "|---|---|---|---|"]
    lines += [
        f"| {f.name} | `{f.model_type}` | {f.special} | {'no' if f.name in UNSHARED else 'yes'} |" for f in FAMILIES
    ]
    return "\n".join(lines) + "\n"


def write_between(marker: str, text: str) -> None:
    """Put ``text`` into docs/models.md, between two comments of that name."""
    before, rest = DOCS.read_text().split(f"<!-- {marker} -->\n")
    _, after = rest.split(f"<!-- /{marker} -->\n")
    DOCS.write_text(f"{before}<!-- {marker} -->\n{text}<!-- /{marker} -->\n{after}")


if __name__ == "__main__":
    write_between("families", table())
