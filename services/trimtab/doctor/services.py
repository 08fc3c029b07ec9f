"""Whether the services that a PPO stage calls answer, what they serve, and whether they speak the policy's tokens."""

from __future__ import annotations

from trimtab.doctor.finding import Finding, failed, ok, skipped
from trimtab.doctor.plan import Plan
from trimtab.models.errors import ModelLoadError
from trimtab.models.tokenizers import load_tokenizer, tokenizer_digest
from trimtab.rounds.launchers.process import port_is_free
from trimtab.trainer.stages import PpoConfig
from trimtab.weights.errors import StoreError
from trimtab.weights.sources import resolve_source
from trimtab.weights.store import Store
from trimtab_client import ModelClient, ModelInfo, TrimtabError
from trimtab_client.channel import parse_addresses

ANSWER_S = 10.0


def reach(plan: Plan) -> tuple[list[Finding], dict[str, ModelInfo]]:
    """A finding for each address, and what each service serves whose every address answered."""
    findings: list[Finding] = []
    served: dict[str, ModelInfo] = {}
    for name, addresses in plan.called.items():
        answers = [_ask(plan, name, address, findings) for address in parse_addresses(addresses)]
        if all(answers) and answers[0] is not None:
            served[name] = answers[0]
    findings += [_to_be_started(name, f"{config.host}:{config.port}") for name, config in plan.services.items()]
    return findings, served


def running(plan: Plan) -> frozenset[str]:
    """The services that the recipe would start and that run already: their memory is taken."""
    return frozenset(
        name
        for name, config in plan.services.items()
        if config.port and not port_is_free(f"{config.host}:{config.port}")
    )


def same_tokens(plan: Plan, served: dict[str, ModelInfo], store: Store | None) -> list[Finding]:
    """Whether every service's tokenizer is the policy's; the reward's may be another with `score_text`."""
    ppo = plan.ppo
    if ppo is None:
        return []
    check = "tokenizers"
    try:
        folder = resolve_source(ppo.stage.model, store).path_or_id
        expected, where = tokenizer_digest(load_tokenizer(folder)), f"the policy {ppo.stage.model}"
    except (StoreError, ModelLoadError) as error:
        if "generator" not in served:
            return [skipped(check, f"the policy's cannot be read here ({error}), and no generator serves it")]
        expected, where = served["generator"].tokenizer_digest, "the generator"
    if not served:
        return [skipped(check, f"{where} has {expected[:19]}…; no service answers to compare it with")]
    findings = [
        failed(
            f"{check}: {name}",
            f"{_digest(ppo, name, info)[:19]}… is not {expected[:19]}… of {where}",
            "set score_text: true, or serve a reward model of the policy's tokens"
            if name == "reward"
            else f"serve a {name} that the policy descends from",
        )
        for name, info in served.items()
        if _digest(ppo, name, info) != expected and not (name == "reward" and ppo.score_text)
    ]
    return findings or [ok(check, f"{expected[:19]}… of {where} is that of {', '.join(served)}")]


def _ask(plan: Plan, name: str, address: str, findings: list[Finding]) -> ModelInfo | None:
    check = f"{name} at {address}"
    try:
        with ModelClient(address, plan.options) as client:
            info = client.get_model(timeout_s=ANSWER_S)
    except TrimtabError as error:
        findings.append(failed(check, str(error), _advice(name, error)))
        return None
    version = f"{info.version}" if info.version.run_id else info.version.name
    size = f"{info.parameter_count:,} parameters" if info.parameter_count else info.architecture
    findings.append(ok(check, f"serves {version} ({info.dtype}, {size})".replace("(, ", "(")))
    return info


def _advice(name: str, error: TrimtabError) -> str:
    if error.code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        return "give --token-file, or a certificate, with the role that the trainer has"
    return f"start it (trimtab up, trimtab serve {name}), or correct {name}_address"


def _to_be_started(name: str, address: str) -> Finding:
    """A service that the recipe starts itself: its port must be free, unless it runs already."""
    check = f"{name} at {address}"
    if address.endswith(":0") or port_is_free(address):
        return ok(check, "is started by the recipe; its port is free")
    try:
        with ModelClient(address) as client:
            info = client.get_model(timeout_s=ANSWER_S)
        return ok(check, f"runs already and serves {info.version}")
    except TrimtabError as error:
        if error.code in ("UNIMPLEMENTED", "UNAUTHENTICATED", "PERMISSION_DENIED"):
            return ok(check, "runs already")
        return failed(check, f"something else listens there ({error.code})", f"stop it, or give {name} another port")


def _digest(ppo: PpoConfig, name: str, info: ModelInfo) -> str:
    if name == "reward" and ppo.reward_scorer:
        named = {scorer.name: scorer.tokenizer_digest for scorer in info.scorers}
        return named.get(ppo.reward_scorer, f"no scorer {ppo.reward_scorer}")
    return info.tokenizer_digest
