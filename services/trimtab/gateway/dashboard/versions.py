"""The versions in the store with where they came from, and the roll back: moving the pointer, for admins."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from trimtab.gateway.access import AUDITED
from trimtab.gateway.config import GatewayConfig
from trimtab.gateway.dashboard.pages import gate_of, page, roles_of
from trimtab.gateway.guard import Visit, visit_of
from trimtab.gateway.problems import Problem
from trimtab.gateway.schemas import STEP_MAX
from trimtab.runtime.audit import AuditLog
from trimtab.runtime.errors import StartError
from trimtab.weights.errors import InvalidNameError, LeaseHeldError, StoreError, VersionNotFoundError
from trimtab.weights.manifest import Manifest
from trimtab.weights.store import Store, open_store

router = APIRouter(include_in_schema=False)
SHOWN_METRICS = ("normalized_score_mean", "kl_nats_per_sequence", "loss", "validation_pair_accuracy")
NEWEST = 50
ROLL_BACK = "/dashboard/roll-back"


class RollBack(BaseModel):
    """The version that is to be current."""

    run_id: str = Field(max_length=128)
    name: str = Field(max_length=128)
    step: int = Field(ge=0, le=STEP_MAX)


@dataclass(frozen=True)
class Shelf:
    """The versions of one model, newest first, and which is current."""

    run_id: str
    name: str
    current: int | None
    versions: list[Manifest]


class VersionShelf:
    """The store as the page shows it; None where the gateway has none."""

    def __init__(self, config: GatewayConfig) -> None:
        try:
            self.store: Store | None = open_store(config.store) if config.store else None
        except StoreError as error:
            raise StartError(f"store: {error}") from None

    def read(self) -> list[Shelf]:
        """Every model with its newest versions. Raises StoreError."""
        store = self.store
        if store is None:
            raise VersionNotFoundError("no store; set `store` in the gateway's settings")
        models: dict[tuple[str, str], list[Manifest]] = {}
        for manifest in store.versions():
            models.setdefault((manifest.version.run_id, manifest.version.name), []).append(manifest)
        return [self._shelf(store, *model, found) for model, found in models.items()]

    def _shelf(self, store: Store, run_id: str, name: str, found: list[Manifest]) -> Shelf:
        current = store.current_version(run_id, name)
        return Shelf(run_id, name, current.step if current else None, found[::-1][:NEWEST])


@router.get("/dashboard/versions")
async def versions(request: Request) -> Response:
    """All models and their versions."""
    shelf: VersionShelf = request.app.state.versions
    shelves: list[dict[str, Any]] = []
    trouble = ""
    try:
        shelves = [_view(one) for one in await asyncio.to_thread(shelf.read)]
    except StoreError as error:
        trouble = str(error)
    may_move = "admin" in await roles_of(request)
    return await page(request, "versions", shelves=shelves, trouble=trouble, may_move=may_move)


@router.post(ROLL_BACK)
async def roll_back(request: Request, asked: Annotated[RollBack, Body()]) -> Response:
    """Move a model's pointer to a version that it has; services that follow it serve it soon."""
    shelf: VersionShelf = request.app.state.versions
    if shelf.store is None:
        raise Problem("NOT_FOUND", "this gateway has no store")
    moved = await asyncio.to_thread(_move, shelf.store, asked, gate_of(request).audit, visit_of(request))
    return JSONResponse({"version": str(moved.version)})


def _move(store: Store, asked: RollBack, audit: AuditLog, visit: Visit) -> Manifest:
    """Move the pointer and note what came of it: all on one thread, which goes on where the caller hangs up."""
    outcome = "INTERNAL"
    try:
        moved = store.set_current(asked.run_id, asked.name, asked.step)
        outcome = "OK"
        return moved
    except VersionNotFoundError as error:
        outcome = "NOT_FOUND"
        raise Problem(outcome, str(error), field="step") from None
    except InvalidNameError as error:
        outcome = "INVALID_ARGUMENT"
        kinds = {"model name": "name", "step": "step"}  # as the store's own words begin
        field = next((field for kind, field in kinds.items() if str(error).startswith(kind)), "run_id")
        raise Problem(outcome, str(error), field=field) from None
    except (LeaseHeldError, StoreError) as error:
        outcome = "UNAVAILABLE"
        raise Problem(outcome, str(error)) from None
    finally:
        target = f"{asked.run_id}/{asked.name}@{asked.step}"
        audit.act(who=visit.caller.name, what=AUDITED[ROLL_BACK], target=target, outcome=outcome, peer=visit.host)


def _view(shelf: Shelf) -> dict[str, Any]:
    rows = [
        {
            "step": manifest.version.step,
            "digest": manifest.version.digest.partition(":")[2][:12],
            "kind": manifest.kind,
            "size_mib": manifest.size_bytes / 2**20,
            "made_at": f"{manifest.created_at:%Y-%m-%d %H:%M}",
            "parent": manifest.parent or "",
            "lineage": {key: value for key, value in manifest.lineage.items() if value},
            "metrics": {name: manifest.metrics[name] for name in SHOWN_METRICS if name in manifest.metrics},
            "current": manifest.version.step == shelf.current,
        }
        for manifest in shelf.versions
    ]
    return {"run_id": shelf.run_id, "name": shelf.name, "current": shelf.current, "versions": rows}
