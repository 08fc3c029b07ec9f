"""Follows the pointer of one model, so that a service learns of a new version or a roll back.

It polls, and ``nudge`` makes it look at once. A store that does not answer for a while is waited for: what is being
served goes on being served.
"""

import asyncio
import logging
from collections.abc import AsyncIterator

from trimtab.weights.errors import CorruptVersionError, StoreUnavailableError, VersionNotFoundError
from trimtab.weights.manifest import Manifest
from trimtab.weights.store import Store
from trimtab_client import ModelVersion

logger = logging.getLogger(__name__)


class PointerWatcher:
    """Async iterator over the manifests that the pointer moves to; it never ends by itself.

    ``seen`` is what the caller serves already; without it the first thing to come is the current version. Only the
    newest is reported: versions that were passed by between two looks are not. ``last_error`` is why the last look
    failed, None after a look that worked.
    """

    def __init__(
        self, store: Store, run_id: str, name: str, interval_s: float = 2.0, *, seen: ModelVersion | None = None
    ) -> None:
        if interval_s <= 0:
            raise ValueError(f"interval_s is {interval_s}: it must be positive")
        self.store = store
        self.run_id = run_id
        self.name = name
        self.interval_s = interval_s
        self.last_error: Exception | None = None
        self._seen = (seen.step, seen.digest) if seen is not None else None
        self._nudged = asyncio.Event()

    def nudge(self) -> None:
        """Makes the watcher look now instead of at the end of its interval. Call from the event loop's thread."""
        self._nudged.set()

    def __aiter__(self) -> AsyncIterator[Manifest]:
        return self

    async def __anext__(self) -> Manifest:
        while True:
            self._nudged.clear()
            manifest = await self._look()
            if manifest is not None:
                return manifest
            try:
                await asyncio.wait_for(self._nudged.wait(), self.interval_s)
            except TimeoutError:
                continue

    async def _look(self) -> Manifest | None:
        try:
            manifest = await asyncio.to_thread(self._moved_to)
        except (StoreUnavailableError, VersionNotFoundError, CorruptVersionError) as error:
            if str(error) != str(self.last_error):
                logger.warning(
                    "cannot follow %s/%s, trying again every %g s: %s", self.run_id, self.name, self.interval_s, error
                )
            self.last_error = error
            return None
        self.last_error = None
        return manifest

    def _moved_to(self) -> Manifest | None:
        version = self.store.current_version(self.run_id, self.name)
        if version is None or (version.step, version.digest) == self._seen:
            return None
        manifest = self.store.get(self.run_id, self.name, version.step)
        self._seen = (version.step, version.digest)
        return manifest
