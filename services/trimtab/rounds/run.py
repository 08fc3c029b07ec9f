"""One run of rounds: a recipe, a folder, and the services, from where the journal says it stands to the end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from trimtab.rounds.journal import Journal, exclusive
from trimtab.rounds.launchers.local import Supervisor
from trimtab.rounds.pipeline import run_stages
from trimtab.rounds.recipe import Recipe, RecipeError, check_unchanged, file_digest
from trimtab.rounds.report import write_rounds_report
from trimtab.rounds.stages.context import RoundsContext, StageConfigs
from trimtab.rounds.stages.plan import stage_names, stages
from trimtab.rounds.stages.services import RoundServices, Services, Watch
from trimtab.weights.store import open_store

KEPT_VERSIONS = 5  # the trainer's own default


@dataclass(frozen=True)
class OnCluster:
    """A run on Kubernetes: where its versions and its training data go (fsspec URLs), and in which namespace.

    `share_gpus`: the model services have none while SFT and reward model train, for clusters of few GPUs.
    """

    store: str
    data: str
    namespace: str = ""
    share_gpus: bool = False


def run_rounds(
    recipe: Recipe,
    configs: StageConfigs,
    folder: Path,
    *,
    cores: int,
    watch: Watch,
    say: Callable[[str], None],
    wait: bool = True,
    until: str | None = None,
    cluster: OnCluster | None = None,
) -> Path | None:
    """Run what is not done yet and write the report after each round; returns its page, None before the first round.

    `recipe` and `configs` hold absolute paths. `until` names the last stage to run ("1/reward"); with `wait` false a
    stage whose rankings are missing ends the run with RankingsMissingError. Services are processes of this machine, or
    those of a `cluster`.

    Raises:
        RecipeError: the folder was begun with another recipe or other data.
        FolderBusyError, JournalError, and what stops a stage.
    """
    if until is not None and until not in stage_names(recipe.rounds):
        raise RecipeError(f"no stage {until!r}; there are {', '.join(stage_names(recipe.rounds))}")
    folder = folder.resolve()
    with exclusive(folder), ExitStack() as stack:
        journal = _open_journal(recipe, folder)
        supervisor = stack.enter_context(Supervisor())
        store = cluster.store if cluster else str(folder / "store")
        keep_versions = recipe.ppo.stage.steps + 1 if recipe.evaluate.checkpoints > 1 else KEPT_VERSIONS
        here = RoundServices(
            supervisor,
            folder / "services",
            store,
            folder / "runs",
            cores=cores,
            keep_versions=keep_versions,
            watch=watch,
        )
        services = here if cluster is None else _on_cluster(cluster, recipe, folder, journal, here, say, keep_versions)
        context = RoundsContext(
            recipe=recipe,
            configs=configs,
            folder=folder,
            store=open_store(store),
            journal=journal,
            services=services,
            stack=stack,
            say=say,
            wait=wait,
        )
        page = None
        planned = stages(context)
        for number in range(recipe.rounds + 1):
            own = [stage for stage in planned if stage.name.startswith(f"{number}/")]
            run_stages(own, journal, say, until=until)
            if number and journal.done(f"{number}/publish"):
                page = write_rounds_report(folder, recipe, journal)
            if until in {stage.name for stage in own}:
                break
        return page


def _on_cluster(
    cluster: OnCluster,
    recipe: Recipe,
    folder: Path,
    journal: Journal,
    here: RoundServices,
    say: Callable[[str], None],
    keep_versions: int,
) -> Services:
    """The services of a cluster; a model that judges runs beside this process."""
    from trimtab.rounds.launchers.kubernetes import Cluster
    from trimtab.rounds.launchers.kubernetes_rounds import ClusterPlace, KubernetesRoundServices

    def waiting(detail: str) -> None:
        if detail:
            say(f"waiting: {detail}")
        journal.wait(journal.newest_stage, detail)

    place = ClusterPlace(
        name=recipe.name,
        store=open_store(cluster.store),
        data=cluster.data,
        runs=folder / "runs",
        share_gpus=cluster.share_gpus,
        keep_versions=keep_versions,
    )
    api = Cluster.connect(cluster.namespace)
    return KubernetesRoundServices(api, place, gold=here.gold, waiting=waiting, say=say)


def _open_journal(recipe: Recipe, folder: Path) -> Journal:
    """The folder's journal, begun with this recipe if it is new and checked against it if not."""
    journal = Journal(folder)
    digests = {key: file_digest(path) for key, path in recipe.data_files().items()}
    begun = journal.begun
    if begun is None:
        journal.begin(recipe.model_dump(mode="json"), digests)
        return journal
    check_unchanged(recipe, begun.recipe or {}, digests, begun.data)
    journal.verify_files()
    return journal
