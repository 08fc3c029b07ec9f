"""Markdown of prompts and responses as HTML that is safe to show, with code in colour.

Three walls: markdown-it passes no HTML of the text through, nh3 keeps only the tags listed here, and the page's
Content-Security-Policy runs no script and loads nothing from elsewhere. Pictures stay text for the same reason.
"""

from __future__ import annotations

import re
from functools import lru_cache

import nh3
from markdown_it import MarkdownIt
from markupsafe import Markup, escape
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

TAGS = {
    *("p", "br", "hr", "em", "strong", "s", "blockquote", "a", "ul", "ol", "li", "code", "pre", "span", "div"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td"),
}
ATTRIBUTES = {
    "a": {"href", "title"},
    "span": {"class"},
    "ol": {"start"},
    "pre": {"class", "tabindex"},
    "div": {"class"},
    "td": {"align"},
    "th": {"align"},
}
SCHEMES = {"http", "https", "mailto"}
LONGEST_HIGHLIGHTED = 50_000
LONGEST_RENDERED = 400_000
_CODE_CLASS = re.compile(r"[a-z][a-z0-9]{0,3}|highlight|code|scroll")
_HEADING = re.compile(r"<(/?)h[1-6]>")


@lru_cache(maxsize=512)
def render_markdown(text: str) -> Markup:
    """HTML of a text; plain escaped text where it is too long to be rendered quickly."""
    if len(text) > LONGEST_RENDERED:
        return Markup('<pre class="code" tabindex="0">') + escape(text) + Markup("</pre>")
    clean = nh3.clean(
        _markdown.render(text),
        tags=TAGS,
        attributes=ATTRIBUTES,
        attribute_filter=_keep_attribute,
        url_schemes=SCHEMES,
        link_rel="noopener noreferrer nofollow",
    )
    # Headings of a response must not stand among the page's own, which screen readers navigate by.
    clean = _HEADING.sub(lambda tag: "</div>" if tag.group(1) else '<div class="heading">', clean)
    return Markup(clean.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>"))


def _keep_attribute(tag: str, name: str, value: str) -> str | None:
    if name == "class":
        return value if all(_CODE_CLASS.fullmatch(part) for part in value.split()) else None
    return value


def _highlight(code: str, language: str, attributes: str) -> str:
    return f'<pre class="code" tabindex="0"><code>{_colored(code, language)}</code></pre>\n'


def _colored(code: str, language: str) -> str:
    if not language or len(code) > LONGEST_HIGHLIGHTED:
        return str(escape(code))
    try:
        lexer = get_lexer_by_name(language, stripnl=False)
    except ClassNotFound:
        return str(escape(code))
    return highlight(code, lexer, HtmlFormatter(nowrap=True))


def _make() -> MarkdownIt:
    markdown = MarkdownIt("commonmark", {"html": False, "breaks": True, "highlight": _highlight})
    return markdown.enable(["table", "strikethrough"]).disable(["image", "html_block", "html_inline"])


_markdown = _make()
