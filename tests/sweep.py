"""Every causal language model of the installed transformers: it runs and is right, or is refused with a reason.

A small random checkpoint of each model type is examined in one process: documents beyond windows, with all token ids,
weights resident and streamed. What may not happen is a result that differs from transformers' own, or an error that is
no `UserError`. ``python -m tests.sweep`` writes the summary into docs/models.md; with model types, it only prints.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from tests.families import DECODER, write_between
from tests.tiny_models import VOCABULARY, save_tiny, tiny_config, truth
from tests.tolerances import TOKEN

MOST_PARAMETERS = 20_000_000  # a larger one is not tiny: its config has a field that `tiny_models.SMALL` lacks
# Fields that the sizes of the other ones ask for.
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "bamba": MAMBA,
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "dots1": EXPERTS,
    "dots3_note": {"per_layer_config": None, "head_dim": 20},
    "dots3_note_text": {"per_layer_config": None, "head_dim": 20},
    "ernie4_5_moe": {"moe_k": 2, "moe_num_shared_experts": 1},
    "gemma3n_text": {
        "num_hidden_layers": 10, "num_kv_shared_layers": 5, "activation_sparsity_pattern": None, "laurel_rank": 8,
    },
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 24},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**MAMBA, "layer_types": ["full_attention"] * 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"num_layers": 2, "head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "qwen4_exp": INDEXER,
    "qwen4_exp_text": INDEXER,
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "mamba_headdim": 16, "n_mamba_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

# Config fields that say what a forward returns, or that make another kind of model.
NO_SWITCH = {
    "use_cache", "return_dict", "output_hidden_states", "output_attentions", "output_router_logits", "is_decoder",
    "is_encoder_decoder", "add_cross_attention",
}  # fmt: skip

Kind = Literal["runs", "refused", "not built", "wrong", "crashes"]


class Case(NamedTuple):
    """A model type, and config fields for it with a name of their own."""

    model_type: str
    variant: str = ""
    own: dict[str, Any] = {}  # noqa: RUF012

    def __str__(self) -> str:
        return f"{self.model_type}, {self.variant}" if self.variant else self.model_type


class Outcome(NamedTuple):
    """What became of a case, and why."""

    case: Case
    kind: Kind
    why: str = ""


def cases() -> Iterator[Case]:
    """All model types; those that are encoders by default as decoders too."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        own = OWN.get(model_type, {})
        yield Case(model_type, "", own)
        if getattr(CONFIG_MAPPING[model_type], "is_decoder", None) is False:
            yield Case(model_type, "as a decoder", {**own, **DECODER})


def variants(case: Case) -> Iterator[Case]:
    """A case with each of its config's switches turned, and with a rotary embedding that depends on the length."""
    text = tiny_config(case.model_type, **case.own).get_text_config(decoder=True).to_dict()
    for name, value in text.items():
        if isinstance(value, bool) and name not in NO_SWITCH:
            yield Case(case.model_type, f"{name} = {not value}", {**case.own, name: not value})
    rope = text.get("rope_parameters") or {}
    if "rope_theta" in rope:
        dynamic = {**rope, "rope_type": "dynamic", "factor": 2.0}
        own = {**case.own, "rope_parameters": dynamic, "max_position_embeddings": 64}
        yield Case(case.model_type, "dynamic rope", own)


def examine(case: Case, folder: Path) -> Outcome:
    """Run a case in ``folder``, which is left empty."""
    try:
        return _examine(case, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _examine(case: Case, folder: Path) -> Outcome:
    import numpy as np
    import torch
    from mpi4py import MPI

    from cpmpi.errors import UserError, one_line
    from cpmpi.model.checkpoint import Checkpoint
    from cpmpi.model.probe import probe
    from cpmpi.model.stages import stages_of
    from tests.test_models import LENGTHS, scores, weightless

    folder.mkdir()
    try:
        config = tiny_config(case.model_type, **case.own)
        config.save_pretrained(folder)
        n_parameters = parameters(config)
    except Exception as error:
        return Outcome(case, "not built", f"{type(error).__name__}: {one_line(error)}")
    if n_parameters > MOST_PARAMETERS:
        return Outcome(case, "not built", f"{n_parameters:,} parameters")
    try:
        weightless(folder)
        skeleton = Checkpoint(folder).skeleton(torch.float32)
        probe(skeleton)
        stages_of(skeleton)
    except UserError as refusal:
        return Outcome(case, "refused", str(refusal).removeprefix(f"{folder}: "))
    except Exception as error:
        return Outcome(case, "crashes", f"{type(error).__name__}: {one_line(error)}")
    try:
        save_tiny(folder, config, seed=1)
        config.save_pretrained(folder)  # some models save their text config alone
        expected = [truth(folder, any_tokens(n)) for n in LENGTHS]
        assert all(np.isfinite(logprobs[1:]).all() for logprobs in expected)
    except Exception as error:
        return Outcome(case, "not built", f"transformers: {type(error).__name__}: {one_line(error)}")
    try:
        found = scores(MPI.COMM_SELF, folder, make=any_tokens)
        streamed = scores(MPI.COMM_SELF, folder, stream=True, make=any_tokens)
    except UserError as refusal:
        return Outcome(case, "refused", str(refusal).removeprefix(f"{folder}: "))
    except Exception as error:
        return Outcome(case, "crashes", f"{type(error).__name__}: {one_line(error)}")
    pairs = zip((*found, *streamed), (*expected, *found), strict=True)
    worst = max(np.abs(got - want)[1:].max() for got, want in pairs)
    return Outcome(case, "runs" if worst <= TOKEN else "wrong", f"{worst:.1e}")


def is_supported(case: Case, folder: Path) -> bool:
    """Whether a small checkpoint of a case can be made, and cpmpi makes its model and runs its probe."""
    import torch

    from cpmpi.errors import UserError
    from cpmpi.model.checkpoint import Blueprint
    from cpmpi.model.probe import probe

    try:
        config = tiny_config(case.model_type, **case.own)
        config.save_pretrained(folder)
        n_parameters = parameters(config)
    except Exception:
        return False
    try:
        probe(Blueprint(folder).skeleton(torch.float32))
    except UserError:
        return False
    return n_parameters <= MOST_PARAMETERS


def any_tokens(n_tokens: int) -> Any:
    """A document of all token ids, special ones included."""
    import numpy as np

    return np.random.default_rng(n_tokens).integers(0, VOCABULARY, n_tokens)


def parameters(config: Any) -> int:
    """How many the model has."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def summary(outcomes: Sequence[Outcome]) -> str:
    """What runs, what is refused and why, and what could not be tried, for docs/models.md."""
    import transformers

    named = {kind: [f"`{o.case}`" for o in outcomes if o.kind == kind] for kind in get_args(Kind)}
    refused: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.kind == "refused":
            refused.setdefault(reason(outcome.why), []).append(f"`{outcome.case}`")
    lines = [f"With transformers {transformers.__version__}, {len(named['runs'])} run and are right:", ""]
    lines += [", ".join(named["runs"]) + ".", "", f"{len(named['refused'])} are refused:", ""]
    lines += ["| why | refused |", "|---|---|", *(f"| {why} | {', '.join(refused[why])} |" for why in sorted(refused))]
    lines += ["", f"{len(named['not built'])} have no small example: transformers does not build the model from its"]
    lines += [f"config alone, or not a small one: {', '.join(named['not built'])}."]
    return "\n".join(lines) + "\n"


def reason(why: str) -> str:
    """Why a model is refused, without its name and what is in brackets."""
    first, _, rest = why.partition(" ")
    return re.split(r" \(|; cpmpi", why if first == "the" else rest)[0]


def main() -> None:
    """Examine the model types that are asked for, or all; see the top."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    names = set(sys.argv[1:])
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases():
            if not names or case.model_type in names:
                outcomes.append(examine(case, Path(folder) / "model"))
                print(f"{outcomes[-1].kind:9} {case!s:30} {outcomes[-1].why}", flush=True)
    if not names:
        write_between("sweep", summary(outcomes))


if __name__ == "__main__":
    main()
