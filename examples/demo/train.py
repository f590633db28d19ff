"""Train the demo's checkpoint: a Llama of a million parameters for 128k tokens of Python code, on a CPU.

Half an hour on two cores:

    python examples/demo/train.py --output examples/demo/checkpoint

It exists so that `cpmpi demo` and the tests have a real checkpoint (grouped-query attention, tied embeddings, a
tokenizer of its own) that needs no download, and whose perplexity on a long document means something.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from document import standard_library, training_modules
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from windows import REACH, Phase, sample

END_OF_FILE = "<|endoftext|>"
VOCABULARY = 1024
PEAK_LEARNING_RATE = 4e-3
WARMUP_SHARE = 0.05
PHASES = (
    Phase(window_tokens=512, batch=16, steps=1200, gap_share=0.5),
    Phase(window_tokens=2048, batch=4, steps=100, gap_share=0.5),
    Phase(window_tokens=16384, batch=1, steps=24, gap_share=0.3),
    Phase(window_tokens=32768, batch=1, steps=6, gap_share=0.0),
)


def causal_attention(module: torch.nn.Module, q_BHTD, k_BGTD, v_BGTD, mask, scaling: float, **_: Any):  # type: ignore[no-untyped-def]
    """Causal in the order of the tokens. transformers' own masks take gaps in the positions for packed documents."""
    groups = q_BHTD.shape[1] // k_BGTD.shape[1]
    k_BHTD, v_BHTD = (x.repeat_interleave(groups, dim=1) for x in (k_BGTD, v_BGTD))
    out_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True, scale=scaling)
    return out_BHTD.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("demo_causal", causal_attention)


def new_model() -> LlamaForCausalLM:
    """Three layers, 4 query heads on 2 KV heads of 32; a rope base high enough for 128k positions."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=160, intermediate_size=416, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=REACH,
        rope_parameters={"rope_type": "default", "rope_theta": 2e6}, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=0, dtype="float32", attn_implementation="demo_causal",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text has tokens, and tokens have their exact text back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END_OF_FILE], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_FILE, model_max_length=REACH)


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts, one after the other, each with an end-of-file token behind it."""
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for text in ids for token in [*text, tokenizer.eos_token_id]])


def optimizer_for(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW; the norms' gains do not decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98))


def learning_rate(progress: float) -> float:
    """Linear up to the peak, then linear down to zero; ``progress`` is the share of the training done."""
    return PEAK_LEARNING_RATE * min((progress + 1e-3) / WARMUP_SHARE, (1 - progress) / (1 - WARMUP_SHARE))


def train_step(model: LlamaForCausalLM, ids: torch.Tensor, positions: torch.Tensor) -> float:
    """Gradients of one step's mean loss, clipped; returns the loss in nats per token."""
    logits = model(input_ids=ids[:, :-1], position_ids=positions, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return loss.item()


def train(model: LlamaForCausalLM, tokens: torch.Tensor, phases: list[Phase], state_file: Path | None) -> None:
    """All phases; with ``state_file``, saved there now and then and taken up from there."""
    optimizer = optimizer_for(model)
    schedule = [phase for phase in phases for _ in range(phase.steps)]
    done = list(accumulate((phase.step_weight for phase in schedule), initial=0.0))
    first = 0
    if state_file and state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    began = time.monotonic()
    for step, phase in enumerate(schedule[first:], start=first):
        # A generator per step: a resumed training sees what an uninterrupted one would have seen.
        ids, positions = sample(tokens, phase, torch.Generator().manual_seed(step))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done[step] / done[-1])
        loss = train_step(model, ids, positions)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0 or phase.window_tokens > 4096 or step + 1 == len(schedule):
            seconds = time.monotonic() - began
            print(f"step {step} window {phase.window_tokens} loss {loss:.4f} at {seconds:.0f} s", flush=True)
            if state_file:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save(state, state_file)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo's checkpoint on the standard library's sources.")
    parser.add_argument("--output", type=Path, required=True, help="the checkpoint folder to write")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="save the training's state here, and go on from it")
    parser.add_argument("--steps", type=int, help="at most this many steps in each phase (default: the full training)")
    parser.add_argument("--max-window", type=int, default=REACH, help="no window longer than this")
    parser.add_argument("--modules", type=int, help="train on this many modules only (default: all)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    modules = training_modules(standard_library())[: options.modules]
    texts = [module.read_text(encoding="utf-8") for module in modules]
    tokenizer = train_tokenizer(texts)
    tokens = token_stream(tokenizer, texts)
    model = new_model()
    print(f"{model.num_parameters()} parameters, {len(modules)} modules, {len(tokens)} tokens", flush=True)
    phases = [
        Phase(
            window_tokens=min(phase.window_tokens, options.max_window),
            batch=phase.batch,
            steps=min(phase.steps, options.steps or phase.steps),
            gap_share=phase.gap_share,
        )
        for phase in PHASES
    ]
    train(model, tokens, phases, options.resume)
    model.set_attn_implementation("sdpa")
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
