"""How well the demo's checkpoint reads: held-out modules, and the document from its first quarter to its last.

    python examples/demo/evaluate.py examples/demo/checkpoint

A model trained on short windows falls apart on long documents. Two things show it: the perplexity of the document's
last quarter beside that of its first, which also differ as texts do; and beside that of the same tokens read with
little before them, which is what lengths that the model has hardly seen in training cost it.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from document import DOCUMENT_MODULE, HELD_OUT, document_text, standard_library
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

HEAD_CHUNK_TOKENS = 4096
SHORT_WINDOW_TOKENS = 2048


@torch.inference_mode()
def surprisals(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """(T - 1,) nats of tokens 1 to T - 1, each given all before it; logits of a few tokens exist at a time."""
    hidden = model.model(input_ids=ids[None, :-1], use_cache=False).last_hidden_state[0]
    chunks = zip(hidden.split(HEAD_CHUNK_TOKENS), ids[1:].split(HEAD_CHUNK_TOKENS), strict=True)
    return torch.cat([F.cross_entropy(model.lm_head(h), target, reduction="none") for h, target in chunks])


def windowed_surprisals(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """The same, with between half and all of ``SHORT_WINDOW_TOKENS`` tokens before each, where there are as many."""
    half = SHORT_WINDOW_TOKENS // 2
    parts = [surprisals(model, ids[: half + 1])]
    for start in range(half, len(ids) - 1, half):
        parts.append(surprisals(model, ids[start - half : start + half + 1])[half:])
    return torch.cat(parts)


def report(name: str, nats: torch.Tensor, text_bytes: int | None = None) -> None:
    """A line: the perplexity a token, and where the number of bytes is known, the bits a byte."""
    line = f"{name:<44} {len(nats):>6} tokens  perplexity {math.exp(nats.double().mean()):7.3f}"
    print(
        line if text_bytes is None else f"{line}  bits per byte {nats.sum() / math.log(2) / text_bytes:.3f}", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity of the demo's checkpoint on text it was not trained on.")
    parser.add_argument("checkpoint", type=Path, help="the checkpoint folder")
    parser.add_argument("--characters", type=int, help="the document's length (default: the demo's)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint, local_files_only=True)

    def encode(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer(text, verbose=False)["input_ids"])

    for module in HELD_OUT:
        if module != DOCUMENT_MODULE:
            text = (standard_library() / module).read_text(encoding="utf-8")[: options.characters]
            report(f"{module}, whole", surprisals(model, encode(text)), len(text.encode()))
    text = document_text(options.characters) if options.characters else document_text()
    ids = encode(text)
    whole, windowed = surprisals(model, ids), windowed_surprisals(model, ids)
    report("document, whole", whole, len(text.encode()))
    report(f"document, at most {SHORT_WINDOW_TOKENS} tokens before each", windowed, len(text.encode()))
    for quarter, (long, short) in enumerate(zip(whole.chunk(4), windowed.chunk(4), strict=True), start=1):
        report(f"quarter {quarter}, whole", long)
        report(f"quarter {quarter}, at most {SHORT_WINDOW_TOKENS} before each", short)
    ratio = (whole.chunk(4)[-1].mean() - whole.chunk(4)[0].mean()).exp()
    print(f"perplexity of the last quarter / of the first: {ratio:.3f}")


if __name__ == "__main__":
    main()
