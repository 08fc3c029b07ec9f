"""What the routes share: the settings and the services behind them."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request

from trimtab.gateway.config import GatewayConfig
from trimtab.gateway.upstreams import Upstreams


@dataclass(frozen=True)
class Room:
    """One gateway."""

    config: GatewayConfig
    upstreams: Upstreams


def room_of(request: Request) -> Room:
    """The room that a request came to."""
    return request.app.state.room
