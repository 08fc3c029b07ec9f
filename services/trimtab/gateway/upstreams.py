"""The services behind the gateway, as clients of the SDK, and the names that callers know them by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.gateway.config import GatewayConfig
from trimtab.gateway.problems import Problem
from trimtab.runtime.errors import StartError
from trimtab_client import AsyncGeneratorClient, AsyncRewardClient, AsyncTrainerClient, ChannelOptions, Tls

# Of a service that is down or gone: its other addresses are tried first, then one of them again.
RETRIES = 1


@dataclass(frozen=True)
class RewardModel:
    """One scorer of the reward service, as a caller named it; "" is the service's default one."""

    client: AsyncRewardClient
    scorer: str


class Upstreams:
    """Clients of the services; StartError where the token file cannot be read or would travel without TLS."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        options = _options(config)
        try:
            self._reward = AsyncRewardClient(config.reward, options) if config.reward else None
            self._generator = AsyncGeneratorClient(config.generator, options) if config.generator else None
            self.trainer = AsyncTrainerClient(config.trainer, options) if config.trainer else None
        except ValueError as error:
            raise StartError(f"reward, generator, trainer: {error}") from None
        except OSError as error:
            raise StartError(f"upstream_token_file: cannot read {error.filename}: {error.strerror}") from None

    def reward(self, model: str | None, field: str = "model") -> RewardModel:
        """NAME, one of the reward model's, or NAME:SCORER, one of its service's; Problem 404 for another name."""
        client = self._reward
        scorer = "" if model is None else scorer_in(model, self._config.reward_names)
        if client is None or scorer is None:
            raise self._unknown(model, field, self._config.reward_names if client is not None else ())
        return RewardModel(client, scorer)

    def generator(self, model: str | None, field: str = "model") -> AsyncGeneratorClient:
        """The client of the generator; Problem 404 where there is none by that name."""
        client = self._generator
        if client is None or (model is not None and model not in self._config.generator_names):
            raise self._unknown(model, field, self._config.generator_names if client is not None else ())
        return client

    def served(self) -> list[tuple[tuple[str, ...], AsyncRewardClient | AsyncGeneratorClient]]:
        """The names and the client of each service."""
        found: list[tuple[tuple[str, ...], AsyncRewardClient | AsyncGeneratorClient]] = []
        if self._generator is not None:
            found.append((self._config.generator_names, self._generator))
        if self._reward is not None:
            found.append((self._config.reward_names, self._reward))
        return found

    @property
    def reward_name(self) -> str:
        """The first of the reward model's names."""
        return self._config.reward_names[0]

    async def close(self) -> None:
        """Close the channels."""
        for client in (self._reward, self._generator, self.trainer):
            if client is not None:
                await client.close()

    def _unknown(self, model: str | None, field: str, names: tuple[str, ...]) -> Problem:
        if not names:
            return Problem("NOT_FOUND", "this gateway has no such service behind it", field=field)
        known = ", ".join(repr(name) for name in names)
        return Problem("NOT_FOUND", f"{field}: no model {model!r} here; there is {known}", field=field)


def scorer_in(model: str, names: Sequence[str]) -> str | None:
    """ "" for one of the names, "s" for NAME:s, None for anything else."""
    if model in names:
        return ""
    found = next((model.removeprefix(f"{name}:") for name in names if model.startswith(f"{name}:")), "")
    return found or None


def _options(config: GatewayConfig) -> ChannelOptions:
    secured = config.upstream_ca is not None or config.upstream_cert is not None
    tls = Tls(config.upstream_ca, config.upstream_cert, config.upstream_key, config.upstream_server_name)
    return ChannelOptions(
        tls=tls if secured else None,
        token_file=config.upstream_token_file,
        timeout_s=config.timeout_s,
        retries=RETRIES,
        wait_when_full=False,  # the caller's to do: it is told at once, and holds no slot here meanwhile
    )
