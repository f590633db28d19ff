"""``cpmpi report``: one page with everything in it, what it holds, and what is refused."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from click.testing import CliRunner

from cpmpi.errors import UserError
from cpmpi.jobs.cli import cli
from cpmpi.report.curves import ByPosition, bits_of, curve, log_edges, passages
from cpmpi.report.pack import packed
from cpmpi.report.page import asset, page_parts, script
from cpmpi.report.report import write_report
from cpmpi.run.paths import RunPaths
from cpmpi.run.reader import open_run
from cpmpi.timeline.intervals import Interval, chrome_trace, from_chrome_trace

from .browser import Browser, find_browser
from .conftest import ROOT, clean_environment
from .reported import make_text_run
from .runs import make_run, make_spec, outputs_of

EVIL = "</script><script>document.title='stolen'</script><img src=x onerror=\"document.title='stolen'\">"
TEXTS = {
    f"a {EVIL}": f"def f(x):\n\treturn x  # {EVIL} \u202e\x1b\n" * 20,
    "short \u6f22\u5b57": "\u6f22\u5b57\U0001f600 and so on, \u6f22\u5b57\n" * 12,
    "third": "class A:\n    def g(self):\n        return self.h(1, 2, 3)\n" * 30,
    "not done": "import os\n",
}
NUMBERS = {"u8": "<u1", "u16": "<u2", "u32": "<u4", "i32": "<i4", "f16": "<f2", "f32": "<f4"}
TRACE = [
    Interval(rank=r, what=what, start_s=s, stop_s=s + 0.5, layer=1, round=2, peer=1 - r, n_bytes=8)
    for r in (0, 1) for s, what in ((0.0, "compute"), (0.5, "transfer"), (0.5, "wait"))
]  # fmt: skip


def unpacked(content):
    """The sections of a block, read as the page's code reads them."""
    raw = zlib.decompress(base64.b64decode(content))
    size = int.from_bytes(raw[:4], "little")
    found = {}
    for name, kind, shape, at, length in json.loads(raw[4 : 4 + size]):
        part = raw[4 + size + at :][:length]
        if kind in ("text", "json"):
            found[name] = part.decode() if kind == "text" else json.loads(part)
        else:
            planes = np.frombuffer(part, np.uint8).reshape(np.dtype(NUMBERS[kind]).itemsize, -1)
            found[name] = np.ascontiguousarray(planes.T).view(NUMBERS[kind]).reshape(shape)
    return found


def blocks(page):
    found = re.findall(r'<script type="text/plain" id="block-(\w+)">([\w+/=]*)</script>', page)
    return {name: unpacked(content) for name, content in found}


def invoke(*arguments):
    return CliRunner().invoke(cli, ["report", *map(str, arguments)])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    make_text_run(folder, TEXTS, finished=3)
    (folder / "log").mkdir(exist_ok=True)
    for rank in (0, 1):
        lines = [
            f"2026-01-01 00:00:00,000 {rank}/2 INFO document {name!r}: 7 tokens here; attention {s:.3f} s, head 0.250 s\n"  # noqa: E501
            for name, s in (("third", 9.0), ("third", 1.0 + rank), ("of another run", 50.0))
        ]
        (folder / "log" / f"rank-{rank:05d}.log").write_text("on node\n" + "".join(lines), encoding="utf-8")
    (folder.parent / "trace.json").write_text(chrome_trace(TRACE))
    return folder


@pytest.fixture(scope="module")
def page(run):
    return write_report(run, run.parent / "page.html", trace=run.parent / "trace.json").read_text(encoding="utf-8")


def test_the_page_holds_what_the_run_does(run, page):
    found = blocks(page)
    everything = found["all"]
    documents = everything["documents"]
    assert documents["id"] == list(TEXTS)
    assert documents["has"] == [True, True, True, False]
    assert documents["state"] == ["", "", "", "is not finished"]
    assert set(found) == {"0", "1", "2", "all"}
    with open_run(run) as opened:
        done = list(opened.documents)[:3]
        for name, exact in (("nll", "nll"), ("perplexity", "perplexity"), ("bits_per_byte", "bits_per_byte")):
            assert documents[name][:3] == pytest.approx([getattr(d, exact) for d in done], rel=1e-8)
            assert documents[name][3] is None
        total = sum(d.nll for d in done)
        scored = sum(d.n_tokens - 1 for d in done)
        assert everything["run"]["perplexity"] == pytest.approx(np.exp(total / scored), rel=1e-8)
        n_bytes = sum(dict(d.spec.text)["scored_bytes"] for d in done)
        assert everything["run"]["bits_per_byte"] == pytest.approx(total / np.log(2) / n_bytes, rel=1e-8)
        for i, (document, text) in enumerate(zip(done, TEXTS.values(), strict=False)):
            check_tokens(found[str(i)], document, text)
    first = everything["passages"][0]
    assert first["bits"] == max(bits for row in documents["passages"] for _, _, bits in row)
    text = list(TEXTS.values())[first["document"]]
    assert first["before"] + first["text"] + first["after"] in text
    assert first["text"]


def check_tokens(block, document, text):
    assert block["text"] == text
    ends = np.cumsum(block["lengths"])
    assert ends[-1] == len(text.encode("utf-16-le")) // 2
    np.testing.assert_array_equal(block["ids"], document.token_ids)
    bits = bits_of(document.logprobs)
    assert np.isnan(block["bits"][0])
    np.testing.assert_allclose(block["bits"][1:], bits[1:], rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(np.cumsum(block["characters"]), document.token_characters[:, 0])
    np.testing.assert_array_equal(block["rank"][1:], document.kept("rank")[1:])
    np.testing.assert_allclose(block["entropy"][1:], document.kept("entropy")[1:] / np.log(2), rtol=1e-3)
    best, logprobs = document.kept("topk")
    assert block["best"].shape == best.shape
    np.testing.assert_allclose(block["best_bits"][1:], bits_of(logprobs)[1:], rtol=1e-3)
    own = [block["best_texts"][place] for place in block["best"][:, 1]]  # the second of them is the token itself
    plain = [i for i, word in enumerate(own) if word.isascii()]
    starts = ends - block["lengths"]
    if text.isascii():
        assert all(own[i] == text[starts[i] : ends[i]] for i in plain)
        assert len(plain) == len(own)


def test_time_is_that_of_the_last_start_and_of_this_run(page):
    everything = blocks(page)["all"]
    spent = everything["spent"]
    assert (spent["ranks"], spent["parts"], spent["documents"]) == ([0, 1], ["attention", "head"], 1)
    assert spent["seconds"] == [[1.0, 0.25], [2.0, 0.25]]
    assert everything["trace_rank"].tolist() == [0, 0, 0, 1, 1, 1]
    names = [everything["trace_kinds"][k] for k in everything["trace_what"]]
    assert sorted(names) == ["compute", "compute", "transfer", "transfer", "wait", "wait"]
    assert everything["trace_seconds"].tolist() == [0.5] * 6
    assert from_chrome_trace(chrome_trace(TRACE)) == sorted(TRACE, key=lambda i: (i.rank, i.start_s))


def test_nothing_of_a_document_is_html(page):
    assert "stolen" not in page
    assert page.count("<script") == page.count("</script>") == 5, "four blocks and the code"
    title = "".join(page_parts(EVIL, []))
    assert "<img" not in title.replace('<img id="machine-picture"', "")
    assert "&lt;/script&gt;" in title
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function", script())
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert "connect-src" not in page
    assert "default-src &#x27;none&#x27;" in page


def test_some_documents_and_some_tokens(run, tmp_path):
    n = [
        len(unit["ids"])
        for unit in blocks(write_report(run, tmp_path / "a.html").read_text()).values()
        if "ids" in unit
    ]
    result = invoke(
        run, "--output", tmp_path / "b.html", "--documents=third", "--documents=0-1", f"--tokens={n[0] + n[1]}"
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{tmp_path}/b.html: 3 documents, ")
    found = blocks((tmp_path / "b.html").read_text())
    assert set(found) == {"0", "1", "all"}
    assert found["all"]["documents"]["has"] == [True, True, False]
    assert found["all"]["with_curve"] == [2]
    with open_run(run) as opened:
        exact = curve(bits_of(opened.documents["third"].logprobs)[1:], 160)
    np.testing.assert_allclose(found["all"]["curves"][0], exact, rtol=1e-3)
    for bad in ("4", "2-1", "0-4", "no\x1b"):
        result = invoke(run, "--documents", bad)
        have = r"no such document; the run has 4 documents, 0 to 3: 'a </script>.*', 'third', 'not done'"
        assert re.fullmatch(
            rf"--documents {re.escape(bad.replace(chr(27), chr(92) + 'x1b'))}: {have}", str(result.exception)
        )


def test_what_is_refused(run, tmp_path):
    make_run(tmp_path / "one", make_spec(lengths=(1,), kv=None))
    make_run(tmp_path / "begun", make_spec(lengths=(9, 9), kv=None), stop_after=0)
    (tmp_path / "there.html").write_text("mine")
    (tmp_path / "bad.json").write_text('{"traceEvents": [{"ph": "X"}]}')
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "perplexity.svg").touch()
    out = ("--output", tmp_path / "new.html")
    for arguments, told in (
        ((tmp_path / "nothing",), "nothing: no run here"),
        ((tmp_path / "begun",), "none of its 2 documents has scores; document 'd0' is not finished"),
        ((tmp_path / "one",), "document 'd0' has one token: there is no surprisal to show"),
        ((run, "--documents", "not done"), "document 'not done' is not finished"),
        ((run, "--output", tmp_path / "there.html"), "there.html: exists already; choose another --output, or --overwrite"),  # noqa: E501
        ((run, "--output", tmp_path / "page.txt"), "a page's name ends in .html"),
        ((run, "--output", tmp_path / "no" / "page.html"), f"no folder {tmp_path}/no"),
        ((run, *out, "--trace", tmp_path / "bad.json"), "not a trace of cpmpi (KeyError: 'pid')"),
        ((run, *out, "--model", tmp_path), "has another tokenizer"),
        ((run, *out, "--images", tmp_path / "images"), "images: has perplexity.svg already; choose another, or --overwrite"),  # noqa: E501
    ):  # fmt: skip
        result = invoke(*arguments)
        assert isinstance(result.exception, UserError), (arguments, result.output)
        assert told in str(result.exception), arguments
        assert "\n" not in str(result.exception)
    assert (tmp_path / "there.html").read_text() == "mine"
    assert not (tmp_path / "new.html").exists()


def test_without_a_tokenizer_tokens_are_ids_and_a_page_in_the_run_is_a_part_of_it(tmp_path):
    make_run(tmp_path / "run", make_spec(lengths=(9,), kv=None))
    result = invoke(tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "note: " in result.stderr
    page = RunPaths(tmp_path / "run").report / "report.html"
    assert page in RunPaths(tmp_path / "run").contents(), "deleted with the run by --overwrite"
    ids = outputs_of(0, 9)["token_ids"].tolist()
    assert blocks(page.read_text())["0"]["text"] == "".join(f"<{id}> " for id in ids)
    assert invoke(tmp_path / "run").exit_code == 1
    assert invoke(tmp_path / "run", "--overwrite").exit_code == 0


def test_curves_bands_and_passages():
    random = np.random.default_rng(0)
    documents = [np.concatenate([[np.nan], random.exponential(3.0, n)]) for n in (300, 77, 5, 120, 9)]
    edges = log_edges(301)
    assert (edges[0], edges[1], edges[-1]) == (0, 8, 301)
    assert (np.diff(edges) > 0).all()
    band = ByPosition(edges)
    for bits in documents:
        band.add(bits)
    for b, (a, z) in enumerate(pairwise(edges)):
        means = [np.nanmean(d[a:z]) for d in documents if np.isfinite(d[a:z]).any()]
        assert band.documents[b] == len(means)
        np.testing.assert_allclose(band.quantiles[:, b], np.quantile(means, (0.1, 0.25, 0.5, 0.75, 0.9)), rtol=1e-6)
        every = np.concatenate([d[a:z] for d in documents])
        np.testing.assert_allclose(band.pooled[b], np.nanmean(every))
    mean, low, high = curve(documents[0][1:], 7)
    for w in range(7):
        part = np.sort(documents[0][1:][w * 300 // 7 : (w + 1) * 300 // 7])
        assert mean[w] == pytest.approx(part.mean())
        assert (low[w], high[w]) == (part[round((len(part) - 1) * 0.25)], part[round((len(part) - 1) * 0.75)])
    bits = np.ones(400)
    bits[100:132], bits[110], bits[300:332] = 5.0, 50.0, 7.0
    assert [(p.start, p.stop) for p in passages(bits, 1, most=2)] == [(300, 332), (100, 132)] or passages(bits, 1)[
        0
    ].bits > 6.4
    found = passages(bits, 1)
    assert all(a.stop <= b.start or b.stop <= a.start for i, a in enumerate(found) for b in found[:i])
    assert [p.bits for p in found] == sorted((p.bits for p in found), reverse=True)
    assert passages(np.array([np.nan, 2.0, 4.0]), 1) == [(1, 3, 3.0)]


@pytest.mark.skipif(shutil.which("node") is None, reason="no node here")
def test_the_page_s_functions(tmp_path):
    """Run by node, without a browser: blocks, lines, curves are what Python says."""
    bits = np.random.default_rng(1).exponential(3, 1000).astype(np.float16)
    words = ["ab ", "\n", "\t", "漢", "\U0001f600"] * 200
    block = packed({
        "bits": bits, "ids": np.arange(1000, dtype=np.uint32) * 70000, "text": "".join(words),
        "lengths": np.array([3, 1, 1, 1, 2] * 200, np.uint8),
    })  # fmt: skip
    code = """
    (async () => {
      const s = await sectionsOf(await inflated(bytesOf(BLOCK))), t = new Tokens(s, 1);
      const lines = await linesOf(t.text, 5), c = t.curve(0, 1000, 3);
      console.log(JSON.stringify({ids: [...s.ids].slice(-2), bits: [...t.bits], lines: [...lines].slice(0, 6),
        word: t.word(4), at: [0, 2, 3, 7, 8].map((i) => t.at(i)), mean: [...c.mean], low: [...c.low], high: [...c.high],
        bounds: [...c.bounds],
        odd: visible("a\\u202eb\\u001b"), n: t.text.length}));
    })()"""
    (tmp_path / "code.js").write_text(f"const BLOCK={block!r};{asset('data.js')}{asset('document.js')}{code}")
    done = subprocess.run(["node", str(tmp_path / "code.js")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ids"] == [998 * 70000, 999 * 70000]
    np.testing.assert_array_equal(np.array(found["bits"], np.float16), bits)
    # "ab " and its end; a tab (4) has no room for a wide character (2); two wide ones have it for one letter more
    assert found["lines"][:4] == [0, 4, 5, 9]
    assert found["word"] == "\U0001f600"
    assert found["at"] == [0, 0, 1, 4, 5]
    exact = curve(bits[1:].astype(np.float64), 3)
    np.testing.assert_allclose(found["mean"], exact[0], rtol=1e-5)
    np.testing.assert_allclose([found["low"], found["high"]], exact[1:], rtol=0.02)
    assert found["bounds"] == [1, 334, 667, 1000]
    assert found["odd"] == "a\u00b7b\u241b"


@pytest.mark.skipif(find_browser() is None, reason="no Chromium here: apt-get install chromium")
def test_in_a_browser(run, page):
    """One start for all: what is drawn, chosen, sorted and found, by mouse and keys; no word of a document is obeyed."""  # noqa: E501
    with Browser() as browser:
        browser.open(run.parent / "page.html")
        assert browser.ask("document.title") == "run: cpmpi report"
        assert browser.ask("document.getElementById('reader-title').textContent").startswith("a </script>")
        assert browser.ask("document.querySelectorAll('img').length") == 1, "the machine's"
        lines = browser.ask("[...document.querySelectorAll('.line')].slice(0, 2).map((l) => l.textContent)")
        assert lines[0] == "def f(x):↵"
        shown_text = f"\treturn x  # {EVIL} \u00b7\u241b↵"
        assert shown_text.startswith(lines[1][:40])
        colours = browser.ask(
            "[...document.querySelectorAll('.line > span')].slice(0, 30)"
            ".map((s) => [Number(s.dataset.i), Number((s.className.match(/s(\\d+)/) || [0, 0])[1])])"
        )
        bits = blocks(page)["0"]["bits"]
        assert all(colour == (min(15, int(bits[i])) if bits[i] >= 1 else 0) for i, colour in colours)
        browser.click("th[data-field=tokens] button")
        documents = blocks(page)["all"]["documents"]
        longest = documents["id"][int(np.argmax(documents["tokens"]))]
        assert browser.ask("document.querySelector('tr.row td.name').textContent") == longest
        browser.ask("Object.assign(state.table, {pattern: 'HIR'}).arrange()")
        browser.click("tr.row")
        browser.wait("state.chosen === 2 && state.tokens && state.text.tokens === state.tokens && state.text.lines")
        browser.ask("document.getElementById('text').focus()")
        browser.key("n")
        start = browser.ask("state.text.cursor")
        assert start in [a for a, _, _ in blocks(page)["all"]["documents"]["passages"][2]]
        browser.key("ArrowRight")
        assert browser.ask("state.text.cursor") == start + 1
        assert f"token{start + 1:,}surprisal" in browser.ask("document.getElementById('tip').textContent")
        assert browser.ask("location.hash") == f"#document=2&token={start + 1}"
        browser.ask("document.getElementById('find').value = 'self.h('; findNext()")
        token = browser.ask("state.text.cursor")
        assert "self" in "".join(browser.ask(f"state.tokens.word({token})"))
        inked = "((c) => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((v) => v))"
        for plot in ("position-plot", "curve-plot", "timeline"):
            assert browser.ask(f"{inked}(document.querySelector('#{plot} canvas'))"), plot
        browser.click("#theme")
        assert browser.ask("document.documentElement.dataset.theme") == "dark"
        assert browser.complaints() == []
        assert browser.requests() == []


def test_images(run, tmp_path):
    pytest.importorskip("matplotlib")
    result = invoke(
        run,
        "--output",
        tmp_path / "p.html",
        "--images",
        tmp_path / "i",
        "--documents=third",
        "--trace",
        run.parent / "trace.json",
    )
    assert result.exit_code == 0, result.output
    made = {path.name: path.read_bytes() for path in (tmp_path / "i").iterdir()}
    stems = ("surprisal-000002", "perplexity", "timeline")
    assert set(made) == {stem + ending for stem in stems for ending in (".png", ".svg")}
    assert all(data.startswith(b"\x89PNG") if name.endswith("png") else b"<svg" in data for name, data in made.items())
    assert result.stdout.splitlines()[1] == f"{tmp_path}/i: 6 pictures"


def test_any_title_is_drawn_without_warnings(tmp_path):
    """Chinese with a font that has it, or as boxes: no warning of missing glyphs either way."""
    pytest.importorskip("matplotlib")
    from matplotlib import font_manager

    from cpmpi.run.surprisal import BOX, OWN_FONT, drawable

    assert drawable("plain \xfc") == ("plain \xfc", [OWN_FONT])
    title, families = drawable("\u6f22 \U0010ffff")
    assert title.endswith(f" {BOX}")
    assert (title[0] == "\u6f22") == (len(families) > 1)
    assert {f.name for f in font_manager.fontManager.ttflist} >= set(families)
    spec = make_spec(lengths=(9,), kv=None)
    document = replace(spec.documents[0], id="\u6f22\u5b57\U0001f600 $x$ \x1b\n" + "z" * 300)
    make_run(tmp_path / "run", replace(spec, documents=(document,)))
    line = [
        sys.executable,
        "-W",
        "always",
        "-m",
        "cpmpi",
        "report",
        str(tmp_path / "run"),
        "--images",
        str(tmp_path / "i"),
    ]
    done = subprocess.run(line, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Glyph" not in done.stderr
    assert "font" not in done.stderr.lower()


def test_without_matplotlib_there_is_a_page_and_no_pictures(tmp_path, monkeypatch):
    make_run(tmp_path / "run", make_spec(lengths=(9,), kv=None))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = invoke(tmp_path / "run", "--images", tmp_path / "i")
    assert str(result.exception) == "pictures need matplotlib: pip install 'cpmpi[plot]'"
    assert not (tmp_path / "i").exists()
    assert not (tmp_path / "run" / "report").exists()


@pytest.mark.slow
@pytest.mark.skipif(find_browser() is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize(("documents", "tokens"), [(1, 1_000), (200, 300_000), (1, 1_000_000)])
def test_sizes_in_a_browser(documents, tokens, tmp_path):
    """Few lines are made however long the text is, every place of it is reached, and the page is of the stated size."""
    source = "".join((ROOT / "cpmpi" / "report" / name).read_text() for name in ("report.py", "curves.py", "facts.py"))
    wanted = int(3.0 * tokens / documents)
    text = (source * (wanted // len(source) + 1))[:wanted]
    make_text_run(tmp_path / "run", {f"d{i}": text[i % 50 :] for i in range(documents)})
    page = write_report(tmp_path / "run", tmp_path / "page.html")
    with Browser() as browser:
        browser.open(page)
        n, rows = browser.ask("[state.tokens.n, state.text.rows]")
        assert n * documents > 0.7 * tokens
        assert page.stat().st_size < 400_000 + 20 * n * documents
        for token in (0, n // 2, n - 1):
            browser.ask(f"state.text.go({token})")
            assert browser.ask("Number(document.querySelector('.line .cursor').dataset.i)") == token
        assert browser.ask("document.querySelectorAll('.line').length") < 100
        assert browser.ask("document.querySelectorAll('tr.row').length") < 60
        assert rows < n
        browser.ask(f"choose({documents - 1}, {{token: 5}})")
        assert browser.ask("document.getElementById('reader-title').textContent") == f"d{documents - 1}"
        assert browser.complaints() == []
