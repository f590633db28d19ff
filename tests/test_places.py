"""Where tokens stand in a text, and what belongs to a span."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpmpi.documents.places import places_of
from cpmpi.documents.spans import Spans, cut, read_spans
from cpmpi.errors import UserError
from cpmpi.run.text_places import span_sums, text_facts

TEXTS = st.text(alphabet=st.sampled_from("ab .!?\n\té😀。”\r"), max_size=60)


def parts(text, rule):
    return [text[a:b] for a, b in cut(text, rule)]


@settings(max_examples=100, deadline=None)
@given(TEXTS.filter(bool), st.sampled_from(["lines", "sentences", "paragraphs"]))
def test_every_character_is_in_one_part(text, rule):
    bounds = cut(text, rule)
    assert "".join(parts(text, rule)) == text
    assert (bounds[:, 0] < bounds[:, 1]).all()


def test_where_parts_end():
    assert parts("a\n\nb\r\nc", "lines") == ["a\n", "\n", "b\r\n", "c"]
    assert parts("\n\na\nb\n \t\n\nc\n\n", "paragraphs") == ["\n\na\nb\n \t\n\n", "c\n\n"]
    text = 'He said "no." Then?! 3.5 is e.g. fine... ok\n\nNo end\n\n彼は。「はい。」次'
    assert parts(text, "sentences") == [
        'He said "no." ', "Then?! ", "3.5 is e.g. ", "fine... ", "ok\n\n", "No end\n\n", "彼は。", "「はい。」", "次"
    ]  # fmt: skip


def test_a_run_of_full_stops_is_cut_in_time():
    """From each of them to the last would be 4 * 10**10 steps."""
    assert len(cut("." * 300_000 + "a" + "。" * 300_000, "sentences")) == 1


@settings(max_examples=60, deadline=None)
@given(TEXTS.filter(bool), st.data())
def test_bytes_are_those_of_the_characters(text, data):
    bounds = sorted(data.draw(st.lists(st.integers(0, len(text)), min_size=2, max_size=9)))
    offsets = list(pairwise(bounds))
    found = places_of(text, offsets, Spans(cut(text, "lines")))
    assert (found.n_characters, found.n_bytes) == (len(text), len(text.encode()))
    for (start, stop), (first, last) in zip(found.characters, found.bytes, strict=True):
        assert text.encode()[first:last].decode() == text[start:stop]
    for (start, stop), (first, last) in zip(found.spans.characters, found.span_bytes, strict=True):
        assert text.encode()[first:last].decode() == text[start:stop]


def test_special_tokens_stand_between_the_others():
    """Fast tokenizers give them (0, 0) wherever they are."""
    found = places_of("é b", [(0, 0), (0, 1), (1, 3), (0, 0)])
    assert found.characters.tolist() == [[0, 0], [0, 1], [1, 3], [3, 3]]
    assert found.bytes.tolist() == [[0, 0], [0, 2], [2, 4], [4, 4]]
    assert dict(text_facts(found, 1)) == {"n_characters": 3, "n_bytes": 4, "scored_characters": 3, "scored_bytes": 4}
    assert dict(text_facts(found, 2)) == {"n_characters": 3, "n_bytes": 4, "scored_characters": 2, "scored_bytes": 2}
    unknown = places_of("é b", None)
    assert dict(text_facts(unknown, 1))["scored_bytes"] == -1
    assert dict(text_facts(unknown, 0))["scored_bytes"] == 4


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_token_counts_where_its_first_character_lies(data):
    """Tokens in any order, spans that overlap, tokens that are not scored."""
    starts = np.array(data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=30)))
    logprobs = -np.arange(1, len(starts) + 1, dtype=np.float32)
    logprobs[: data.draw(st.integers(0, len(starts)))] = np.nan
    ends = st.tuples(st.integers(0, 20), st.integers(1, 6))
    spans = np.array([(a, a + n) for a, n in data.draw(st.lists(ends, max_size=6))], np.int64).reshape(-1, 2)
    counts, sums = span_sums(logprobs, starts, spans)
    for (start, stop), count, total in zip(spans, counts, sums, strict=True):
        inside = [p for p, at in zip(logprobs, starts, strict=True) if start <= at < stop and not np.isnan(p)]
        assert count == len(inside)
        assert total == sum(inside)


def test_spans_of_a_file(tmp_path):
    lines = [{"document": "a", "start": 3, "stop": 5, "id": "x"}, {"document": 7, "start": 0, "stop": 9}]
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rule = read_spans(str(tmp_path / "s.jsonl"))
    assert rule.of("a", "0123456").characters.tolist() == [[3, 5]]
    assert rule.of("a", "0123456").ids == ("x",)
    assert rule.of("other", "text").characters.shape == (0, 2)
    with pytest.raises(UserError, match=r"s\.jsonl:2: the span ends at character 9, but document '7' has 8 char"):
        rule.of("7", "01234567")
    with pytest.raises(UserError, match=r"s\.jsonl:2: no document '7' in the input: 'a', 'b'"):
        rule.check_documents(["a", "b"])
    for bad, reason in (
        ({"document": "a", "start": 3, "stop": 3}, r"start 3 and stop 3: must be characters"),
        ({"document": "a", "start": 3}, r'"stop" must be an integer, not null'),
        ({"start": 1, "stop": 2}, r'"document" must be a string'),
        ({"document": "a", "start": 3, "end": 5}, r'unknown "end"; the keys are document, start, stop, id'),
        ([1], "must be an object"),
    ):
        (tmp_path / "bad.jsonl").write_text(json.dumps(bad))
        with pytest.raises(UserError, match=rf"bad\.jsonl:1: .*{reason}"):
            read_spans(str(tmp_path / "bad.jsonl"))
