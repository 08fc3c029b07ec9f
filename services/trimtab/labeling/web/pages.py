"""How pages are filled: one Jinja environment, the visitor's language, safe Markdown, times and shares for people."""

from __future__ import annotations

import hashlib
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import jinja2
from fastapi import Request
from fastapi.responses import HTMLResponse

from trimtab.labeling.rendering import render_markdown
from trimtab.labeling.translations import LANGUAGES, translate, words
from trimtab.labeling.vocabulary import FLAGS, LETTERS, SKIP_REASONS, Role
from trimtab.labeling.web.room import THEME_COOKIE, Visit, language_of

FOLDER = Path(__file__).parent
STATIC = FOLDER / "static"
THEMES = ("auto", "light", "dark")
SCRIPT_WORDS = "js."
NONE = "\u2013"  # what stands for a number that there is not


def page(
    request: Request, template: str, visit: Visit | None = None, *, status: int = 200, **values: Any
) -> HTMLResponse:
    """A page in the visitor's language and theme."""
    language = language_of(request)
    theme = request.cookies.get(THEME_COOKIE, "auto")
    html = (
        _environment()
        .get_template(template)
        .render(
            t=partial(translate, language),
            language=language,
            languages=LANGUAGES,
            theme=theme if theme in THEMES else "auto",
            themes=THEMES,
            path=request.url.path,
            me=visit.labeler if visit else None,
            is_lead=visit is not None and Role(visit.labeler.role).includes(Role.LEAD),
            is_admin=visit is not None and visit.labeler.role == Role.ADMIN,
            csrf=visit.signed_in.csrf_token if visit else "",
            script_words={
                k.removeprefix(SCRIPT_WORDS): v for k, v in words(language).items() if k.startswith(SCRIPT_WORDS)
            },
            duration=partial(duration, language),
            ago=partial(ago, language, now=visit.now if visit else None),
            **values,
        )
    )
    return HTMLResponse(html, status)


def duration(language: str, seconds: float | None) -> str:
    """ "45 s", "1 min 20 s", "3 h"; a dash for None."""
    if seconds is None:
        return NONE
    whole = round(seconds)
    if whole < 60:
        return translate(language, "duration.seconds", s=whole)
    if whole < 600:
        return translate(language, "duration.minutes_seconds", m=whole // 60, s=whole % 60)
    if whole < 7200:
        return translate(language, "duration.minutes", m=round(whole / 60))
    return translate(language, "duration.hours", h=round(whole / 3600))


def ago(language: str, at: datetime | None, now: datetime | None) -> str:
    """ "5 min ago"; a dash for None."""
    if at is None or now is None:
        return NONE
    return translate(language, "duration.ago", time=duration(language, max(0.0, (now - at).total_seconds())))


def asset(name: str) -> str:
    """The address of a static file. The digest is in the path, so browsers keep it for good, and so do the modules
    that scripts import from one another."""
    return f"/static/{static_digest()}/{name}"


@cache
def static_digest() -> str:
    """A digest of all static files together."""
    digest = hashlib.sha256()
    for path in sorted(STATIC.rglob("*")):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def percent(share: float | None, digits: int = 0) -> str:
    """A share as "83 %"; a dash for None."""
    return NONE if share is None else f"{100 * share:.{digits}f} %"


def plain_number(value: float | None, digits: int = 2) -> str:
    """A number with fixed digits; a dash for None."""
    return NONE if value is None else f"{value:.{digits}f}"


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"markdown": render_markdown, "percent": percent, "number": plain_number}
    environment.globals |= {
        "asset": asset,
        "letters": LETTERS,
        "flags": FLAGS,
        "skip_reasons": SKIP_REASONS,
    }
    return environment
