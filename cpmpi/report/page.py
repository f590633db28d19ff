"""One HTML page with everything in it: its code, its style, and blocks of numbers and texts.

What comes from documents is in the blocks alone (`cpmpi.report.pack`), which are base64, and gets onto the screen as
text. The page forbids itself all scripts and styles but its own, by their digests, and any network.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator
from html import escape
from importlib.resources import files

SCRIPTS = ("data.js", "document.js", "plots.js", "table.js", "text.js", "time.js", "page.js")
FORBIDDEN = (
    "default-src 'none'; script-src '{script}'; style-src '{style}'; img-src data:; base-uri 'none'; form-action 'none'"
)


def asset(name: str) -> str:
    """A file of the folder `page`."""
    return files("cpmpi.report").joinpath("page", name).read_text(encoding="utf-8")


def script() -> str:
    """The page's code, of several files in one."""
    return '"use strict";\n' + "\n".join(map(asset, SCRIPTS))


def page_parts(title: str, blocks: Iterable[tuple[str, str]]) -> Iterator[str]:
    """The page, part after part.

    Args:
        title: of the page.
        blocks: name and content (`cpmpi.report.pack.packed`) of each; they are asked for as they are written.
    """
    code, style = script(), asset("page.css")
    forbidden = FORBIDDEN.format(script=_digest(code), style=_digest(style))
    before, after = asset("page.html").split("<!-- blocks -->")
    yield before.replace("{title}", escape(title)).replace("{forbidden}", escape(forbidden)).replace("{style}", style)
    for name, content in blocks:
        yield f'<script type="text/plain" id="block-{name}">{content}</script>\n'
    yield after.replace("{script}", code)


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
