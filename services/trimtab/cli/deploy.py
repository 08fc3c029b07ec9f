"""`trimtab deploy`: bring trimtab to a Kubernetes cluster, see what would change, or what the cluster lacks for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli.errors import CommandError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from trimtab.deploy.objects import Kubectl
    from trimtab.deploy.render import Object
    from trimtab.deploy.rollout import Progress


def deploy(
    overlay: Annotated[str, typer.Argument(help="dev, gpu, or the path of an overlay of your own.")],
    nodes: Annotated[str, typer.Option(help="Whose GPU nodes: gke, eks, aks or on-prem.")] = "",
    components: Annotated[
        list[str] | None, typer.Option("--with", metavar="NAME", help="A component of k8s/components; several times.")
    ] = None,
    images: Annotated[
        list[str] | None, typer.Option("--image", metavar="NAME=REGISTRY/NAME@sha256:…", help="Where an image is.")
    ] = None,
    manifests: Annotated[Path | None, typer.Option(help="Path of k8s/; the checkout's or the installed one.")] = None,
    context: Annotated[str, typer.Option(help="kubectl's context; the current one by default.")] = "",
    check: Annotated[
        bool, typer.Option("--check", help="Only say what is missing in the cluster; exit 1 if any.")
    ] = False,
    render_only: Annotated[bool, typer.Option("--render", help="Only print the manifests.")] = False,
    diff_only: Annotated[bool, typer.Option("--diff", help="Only print what would change.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Apply without asking.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Take over fields that others have set.")] = False,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds to wait for everything to be up.")] = 2400.0,
) -> None:
    """Render, show what changes, apply server-side, and wait until all of it serves."""
    import yaml
    from rich.console import Console

    from trimtab.deploy.objects import Kubectl
    from trimtab.deploy.render import Installation, manifests_folder, render

    installation = Installation(overlay, nodes, tuple(components or ()), tuple(images or ()))
    objects = render(installation, manifests_folder(manifests))
    text = yaml.safe_dump_all(objects, sort_keys=False)
    if render_only:
        typer.echo(text)
        return
    console, kubectl = Console(highlight=False, markup=False), Kubectl(context)
    fatal = _check(console, kubectl, objects)
    if check:
        raise typer.Exit(1 if fatal else 0)
    if fatal:
        raise CommandError("the cluster lacks what is listed above; --check lists it again")
    changes, anew = _changes(kubectl, objects, force)
    console.print(changes or "nothing changes")
    if diff_only:
        return
    if changes:
        if not yes and not typer.confirm("Apply?"):
            raise typer.Exit(1)
        if anew:
            kubectl.delete(yaml.safe_dump_all(anew))
        for line in kubectl.apply(text, force=force):
            console.print(line)
    _wait(console, kubectl, objects, timeout_s)


def _check(console: Console, kubectl: Kubectl, objects: list[Object]) -> bool:
    """Print what is missing; whether some of it is fatal."""
    from trimtab.deploy.check import ClusterFacts, check

    namespace = objects[0]["metadata"]["name"]
    facts = ClusterFacts(
        version=kubectl.server_version(),
        kinds=frozenset(kubectl.kinds()),
        nodes=kubectl.get("nodes"),
        storage_classes=kubectl.get("storageclasses"),
        secrets=frozenset(one["metadata"]["name"] for one in kubectl.get("secrets", namespace=namespace)),
    )
    findings = check(objects, facts)
    for finding in findings:
        console.print(f"{'missing' if finding.fatal else 'note   '}  {finding.text}", soft_wrap=True)
    if not findings:
        console.print("the cluster has all that is needed")
    return any(finding.fatal for finding in findings)


def _changes(kubectl: Kubectl, objects: list[Object], force: bool) -> tuple[str, list[Object]]:
    """What applying would change, and the objects that have to be removed first."""
    import yaml

    from trimtab.deploy.render import name_of
    from trimtab.deploy.templates import made_anew

    namespace = objects[0]["metadata"]["name"]
    if not any(one["metadata"]["name"] == namespace for one in kubectl.get("namespaces")):
        return f"{len(objects)} new objects\n", []
    anew = made_anew(kubectl, objects, force=force)
    text = yaml.safe_dump_all([one for one in objects if one not in anew], sort_keys=False)
    told = "".join(f"{name_of(one)} is made anew: it cannot be changed\n" for one in anew)
    return kubectl.diff(text, force=force) + told, anew


def _wait(console: Console, kubectl: Kubectl, objects: list[Object], timeout_s: float) -> None:
    from rich.live import Live

    from trimtab.deploy.rollout import follow

    now: tuple[Progress, ...] = ()
    with Live(console=console, refresh_per_second=4, transient=not console.is_terminal) as live:
        for now in follow(kubectl, objects, timeout_s):
            live.update(_table(now))
    console.print(f"{len(now)} workloads are up")


def _table(now: tuple[Progress, ...]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table("workload", "ready", "", box=box.SIMPLE_HEAD, pad_edge=False)
    for one in now:
        table.add_row(one.name, f"{one.ready}/{one.wanted}", one.waits_for)
    return table
