"""What people prefer: the win rates of versions that the labeling page counts, campaign by campaign."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from trimtab.gateway.config import GatewayConfig
from trimtab.gateway.dashboard.pages import page
from trimtab.gateway.room import room_of
from trimtab_client import LabelingClient, TrimtabError

router = APIRouter(include_in_schema=False)
NEWEST = 20
TIMEOUT_S = 10.0


@router.get("/dashboard/people")
async def people(request: Request) -> Response:
    """Win rates of the newest campaigns that compare versions."""
    config = room_of(request).config
    campaigns: list[dict[str, Any]] = []
    trouble = ""
    if config.labeling is None:
        trouble = "No labeling page is behind this gateway: set labeling and labeling_token_file."
    else:
        try:
            campaigns = await asyncio.to_thread(_judged_campaigns, config)
        except (TrimtabError, OSError) as error:
            trouble = str(error)
    return await page(request, "people", campaigns=campaigns, trouble=trouble, labeling=config.labeling or "")


def _judged_campaigns(config: GatewayConfig) -> list[dict[str, Any]]:
    assert config.labeling is not None and config.labeling_token_file is not None
    token = config.labeling_token_file.read_text().strip()  # read anew, so that it can be changed
    client = LabelingClient(config.labeling, token, timeout_s=TIMEOUT_S, ca_file=config.upstream_ca)
    found = [one for one in client.campaigns() if one["kind"] != "demonstration"][:NEWEST]
    rated = ({**one, "win_rates": client.win_rates(one["name"])} for one in found)
    return [one for one in rated if one["win_rates"]]
