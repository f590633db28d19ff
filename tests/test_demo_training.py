"""The demo's texts are the same everywhere, its training repeats itself, and its checkpoint has learned."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .tolerances import TOKEN

DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo"
CHECKPOINT = DEMO / "checkpoint"
TINY = ["--steps", "1", "--max-window", "32", "--modules", "3", "--threads", "1"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import one of the demo's scripts by its name."""
    monkeypatch.syspath_prepend(str(DEMO))
    return importlib.import_module


@pytest.fixture(autouse=True)
def as_many_threads_as_before() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_training_reads_the_library_in_one_order_without_what_is_held_out(script: Any, tmp_path: Path) -> None:
    document = script("document")
    wanted = ["a/z.py", "abc.py", "json/__init__.py"]
    unwanted = ["test/t.py", "argparse.py", "site-packages/x.py", "encodings/cp1.py", "_sysconfigdata_x.py", "abc.txt"]
    for name in (*reversed(wanted), *unwanted):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert document.training_modules(tmp_path) == [tmp_path / name for name in wanted]
    library = document.standard_library()
    assert all((library / name).is_file() for name in document.HELD_OUT)


def test_the_document_is_whole_lines_of_about_one_length(script: Any, tmp_path: Path) -> None:
    document = script("document")
    text = document.document_text()
    assert document.DOCUMENT_CHARACTERS - 200 < len(text) <= document.DOCUMENT_CHARACTERS
    module = (document.standard_library() / document.DOCUMENT_MODULE).read_text(encoding="utf-8")
    assert module.startswith(text)
    assert text.endswith("\n")
    with pytest.raises(ValueError, match=f"has {len(module)} characters, the demo's document needs 99999999"):
        document.document_text(99_999_999)


@pytest.mark.parametrize("gap_share", [0.0, 1.0])
def test_gaps_stretch_positions_over_the_whole_reach_and_no_further(script: Any, gap_share: float) -> None:
    windows = script("windows")
    phase = windows.Phase(window_tokens=64, batch=1, steps=1, gap_share=gap_share)
    random = torch.Generator().manual_seed(0)
    drawn = torch.stack([windows.positions(phase, random) for _ in range(500)])
    assert bool((drawn[:, 0] == 0).all())
    assert bool((drawn.diff(dim=1) >= 1).all())
    furthest = int(drawn.max())
    assert furthest == 63 if gap_share == 0 else windows.REACH / 2 < furthest < windows.REACH


def test_a_resumed_training_equals_an_uninterrupted_one(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = script("train")
    train.main([*TINY, "--output", str(tmp_path / "whole")])

    true_step, steps = train.train_step, iter(range(100))

    def interrupted(*arguments: Any) -> float:
        if next(steps) == 2:
            raise KeyboardInterrupt
        loss: float = true_step(*arguments)
        return loss

    resumed = [*TINY, "--output", str(tmp_path / "resumed"), "--resume", str(tmp_path / "state.pt")]
    monkeypatch.setattr(train, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main(resumed)
    train.main(resumed)
    assert next(steps) == 3 + len(train.PHASES) - 1  # the step saved before the interruption was not repeated
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()


def test_the_windowed_evaluation_has_every_token_once(script: Any) -> None:
    """Tokens of the first window have one context in both, and equal log-probabilities (``tolerances.py``)."""
    evaluate, train = script("evaluate"), script("train")
    torch.manual_seed(0)
    model = train.new_model()
    model.set_attn_implementation("sdpa")
    ids = torch.randint(train.VOCABULARY, (evaluate.SHORT_WINDOW_TOKENS + 300,))
    whole, windowed = evaluate.surprisals(model, ids), evaluate.windowed_surprisals(model, ids)
    assert whole.shape == windowed.shape == (len(ids) - 1,)
    first = evaluate.SHORT_WINDOW_TOKENS
    torch.testing.assert_close(windowed[:first], whole[:first], atol=TOKEN, rtol=0)
    assert not torch.allclose(windowed[first:], whole[first:], atol=TOKEN)


def test_the_checkpoint_has_learned(script: Any) -> None:
    evaluate, document = script("evaluate"), script("document")
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, local_files_only=True)
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < 4_000_000
    assert model.config.max_position_embeddings >= 131_072
    assert len(tokenizer) == model.config.vocab_size
    text = (document.standard_library() / "argparse.py").read_text(encoding="utf-8")[:12_000]
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    nats = evaluate.surprisals(model, torch.tensor(ids))
    assert float(nats.sum()) / math.log(2) / len(text.encode()) < 1.7  # tokens drawn at random: 3.7
