"""Responses as HTML: shown as Markdown, never as anything that runs or loads."""

from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.labeling.rendering import ATTRIBUTES, TAGS, render_markdown

ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt&#58;alert(1))",
    "[x](data:text/html;base64,PHNjcmlwdD4=)",
    "<svg/onload=alert(1)>",
    "```<script>\n</code></pre><script>alert(1)</script>\n```",
    "```python class=x onclick=alert(1)\nx\n```",
    "<iframe src=//evil.example>",
    "![x](https://evil.example/track.png)",
    '<a href="https://a" style="position:fixed" onclick="x()">a</a>',
    "<style>*{display:none}</style>",
    "<form action=//evil.example><button>ok</button></form>",
    "</div></main><base href=//evil.example>",
]


class Allowed(HTMLParser):
    """Fails at the first tag or attribute that must not be there."""

    def handle_starttag(self, tag, attrs):
        assert tag in TAGS, tag
        for name, value in attrs:
            assert name in ATTRIBUTES.get(tag, set()) | ({"rel"} if tag == "a" else set()), (tag, name)
            if name == "href":
                assert value.startswith(("http:", "https:", "mailto:", "/", "#")) or ":" not in value, value


@pytest.mark.parametrize("text", ATTACKS)
def test_known_attacks_become_text(text):
    Allowed().feed(render_markdown(text))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([*ATTACKS, "`", "\n", "```html\n", "> ", "<", "&lt;", "**", "|a|\n|-|\n", "](", " "])))
def test_no_mixture_of_attacks_gets_through(parts):
    Allowed().feed(render_markdown("".join(parts)))


def test_markdown_code_and_tables_show():
    shown = render_markdown("**b**\n\n```python\ndef f(): pass\n```\n\n|a|b|\n|-|-|\n|1|2|")
    assert "<strong>b</strong>" in shown and '<span class="k">def</span>' in shown and "<td>1</td>" in shown


def test_line_breaks_stay_and_headings_are_no_headings_of_the_page():
    assert "<br>" in render_markdown("a\nb")
    assert '<div class="heading">Title</div>' in render_markdown("# Title")


def test_a_very_long_text_is_shown_as_it_is():
    assert render_markdown("<b>" * 200_000).startswith('<pre class="code"')
