"""Names and numbers for people: what comes from outside is shown, fits, and can be printed on any terminal."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cpmpi.errors import UserError
from cpmpi.text import counted, cut, escaped_lines, parse_bytes, shown, table, width

from .conftest import ROOT, clean_environment
from .runs import make_run, make_spec


def test_names_are_escaped_and_shortened():
    assert shown("plain, übér 漢字 a\\b") == "plain, übér 漢字 a\\b"
    assert shown("a\nb\r\t\x1b[31m\x7f\x9b\u202e\u2028\udce9") == "a\\nb\\r\\t\\x1b[31m\\x7f\\x9b\\u202e\\u2028\\udce9"
    assert shown("x" * 500) == "x" * 500
    assert shown("a" * 400 + "b" * 400, 30) == "a" * 17 + "..." + "b" * 10
    long = shown("\n" * 10**6 + "end", 30)
    assert long.endswith("\\n\\nend")
    assert len(long) == 30
    assert shown("y" * 40, 30) == "y" * 17 + "..." + "y" * 10
    assert escaped_lines("two\nlines\x1b") == "two\nlines\\x1b"


def test_counts_have_their_noun():
    assert [counted(n, "document") for n in (0, 1, 3000)] == ["0 documents", "1 document", "3,000 documents"]
    assert counted(2, "leaf switch", "leaf switches") == "2 leaf switches"


def test_columns_of_wide_and_combining_characters():
    assert [width(t) for t in ("abc", "漢字", "e\u0301", "")] == [3, 4, 1, 0]
    assert [cut("a漢字", n) for n in (0, 1, 2, 3, 5, 9)] == ["", "a", "a", "a漢", "a漢字", "a漢字"]
    lines = table(("name", "n"), [("漢字\n", "1"), ("b", "22")], left=1).split("\n")
    assert lines == ["name     n", "------  --", "漢字\\n   1", "b       22"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 << 30), ("8gib", 8 << 30), ("8 GiB", 8 << 30), ("512Ki", 512 << 10), ("1.5TiB", 3 << 39),
        ("8GB", 8 * 10**9), ("800m", 8 * 10**8), (".5kb", 500), ("7b", 7), ("1e9", 10**9),
    ],
)  # fmt: skip
def test_sizes(text, size):
    assert parse_bytes(text, "--memory-limit") == size


@pytest.mark.parametrize(
    "text", ["", "GB", "8 i", "8iB", "8GBB", "1.2.3G", "-1GB", "nan", "inf", "0", "0.4", "8\x1bGB", "1e30"]
)
def test_what_is_no_size(text):
    with pytest.raises(
        UserError, match=r"^--memory-limit .*: (not a size such as 8GB, 800MB or 8GiB|must be )"
    ) as refused:
        parse_bytes(text, "--memory-limit")
    assert str(refused.value).isprintable()


def test_any_name_is_printed_on_any_terminal(tmp_path):
    """An id of another script, of control characters, of 200,000 characters: on a terminal that knows Latin-1 alone."""
    from dataclasses import replace

    spec = make_spec(lengths=(5, 5, 5), kv=None)
    names = ("漢字", "a\n\x1b]0;title\x07", "b" * 200_000)
    make_run(
        tmp_path / "run",
        replace(spec, documents=tuple(replace(d, id=n) for d, n in zip(spec.documents, names, strict=True))),
    )
    for encoding in ("latin-1", "utf-8"):
        done = subprocess.run(
            [sys.executable, "-m", "cpmpi", "inspect", str(tmp_path / "run")], cwd=ROOT, capture_output=True,
            env=clean_environment(PYTHONIOENCODING=encoding), timeout=60, check=False,
        )  # fmt: skip
        printed = done.stdout.decode(encoding)
        assert done.returncode == 0, done.stderr
        assert ("漢字" if encoding == "utf-8" else "\\u6f22\\u5b57") in printed
        assert "a\\n\\x1b]0;title\\x07 " in printed
        assert "\x1b" not in printed
        assert max(map(len, printed.splitlines())) < 300
    code = "from cpmpi.jobs import cli; cli.take_any_character(); print('\u6f22\xe9', flush=True)"
    ascii_only = clean_environment(PYTHONIOENCODING="ascii")
    done = subprocess.run([sys.executable, "-c", code], env=ascii_only, cwd=ROOT, capture_output=True, check=True)
    assert done.stdout == b"\\u6f22\\xe9\n", "as the table of a finished job is printed"
    missing = subprocess.run(
        [sys.executable, "-m", "cpmpi", "inspect", f"{tmp_path}/漢\x1b[1m"], cwd=ROOT, capture_output=True, check=False,
        env=clean_environment(PYTHONIOENCODING="ascii"), timeout=60,
    )  # fmt: skip
    assert missing.returncode == 1
    assert "\\u6f22\\x1b[1m" in missing.stderr.decode("ascii")
