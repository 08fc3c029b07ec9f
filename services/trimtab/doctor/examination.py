"""The whole examination of a recipe, question after question."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from trimtab.doctor.devices import CPU, Device, devices_at_hand
from trimtab.doctor.dry_step import dry_step
from trimtab.doctor.finding import Finding, failed
from trimtab.doctor.kernels import kernel_findings
from trimtab.doctor.placement import memory_findings
from trimtab.doctor.plan import Plan
from trimtab.doctor.services import reach, running, same_tokens
from trimtab.doctor.storage import data_findings, disk_findings, store_findings
from trimtab.weights.errors import StoreError
from trimtab.weights.store import Store, open_store


def examine(plan: Plan, given: Mapping[str, Device] | None) -> Iterator[Finding]:
    """Every finding, as soon as it is known. `given` are the devices of another machine; None: those of this one."""
    store: Store | None = None
    if plan.store is not None:
        try:
            store = open_store(plan.store)
        except StoreError as error:
            yield failed(f"store {plan.store}", str(error), "correct the URL, or install what it names")
    here = devices_at_hand()
    devices = here if given is None else dict(given)
    found, served = reach(plan)
    yield from found
    yield from same_tokens(plan, served, store)
    already = running(plan) if given is None else frozenset()
    yield from memory_findings(plan, store, devices, default_device(devices), already)
    questions: tuple[Callable[[], list[Finding]], ...] = (
        lambda: store_findings(plan, store),
        lambda: disk_findings(plan, store) if given is None else [],
        lambda: data_findings(plan),
        lambda: kernel_findings(_computes_on(plan, default_device(devices)), set(here)),
        lambda: dry_step(plan, served, store),
    )
    for question in questions:
        yield from question()


def default_device(devices: Mapping[str, Device]) -> str:
    """Where a trainer computes of which nothing is said: a GPU where there is one."""
    return "cuda:0" if "cuda:0" in devices else CPU


def _computes_on(plan: Plan, default: str) -> set[str]:
    services = {config.device for name, config in plan.services.items() if name != "gateway"}
    trained = {plan.trainer_device or default} if plan.stages else set()
    return {"cuda:0" if device == "cuda" else device for device in services | trained} or {default}
