"""The dashboard: pages for people who watch a run, over the gateway's own routes, roles and limits.

The server renders the pages; one script draws the charts and fills in what changes. Nothing comes from another host.
"""

from __future__ import annotations

from fastapi import FastAPI

from trimtab.gateway.access import Gate
from trimtab.gateway.dashboard import events, pages, people, samples, session, versions
from trimtab.gateway.dashboard.door import Door
from trimtab.gateway.room import Room


def add_to(app: FastAPI, room: Room, gate: Gate) -> None:
    """Add the pages to the gateway's application. Call it after the guard was added, so that the door is outside."""
    app.state.gate = gate
    app.state.versions = versions.VersionShelf(room.config)
    app.add_middleware(Door)
    for module in (pages, session, events, samples, people, versions):
        app.include_router(module.router)
