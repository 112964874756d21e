"""The links to the engines that there are: begun when one joins, ended when one has left and nothing of it is
needed any more. Knows addresses and links; where samples go is the router's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from services.gateway.links.engine_client import EngineLink
from weft import logs

log = logs.get_logger("gateway.discovery")


class Routes(Protocol):
    """Who uses the links: the router."""

    def set_links(self, links: list[EngineLink]) -> None:
        """These are all links now."""


class Fleet:
    """One link for each address. `make_link` begins none, it only makes it."""

    def __init__(self, routes: Routes, make_link: Callable[[str], EngineLink]) -> None:
        self._routes = routes
        self._make_link = make_link
        self._targets: Sequence[str] = ()
        self._links: dict[str, EngineLink] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._is_running = False

    def start(self) -> None:
        """Connect to the engines that are known, and from now on to each when it joins."""
        self._is_running = True
        for link in self._links.values():
            self._run(link)

    def set_targets(self, targets: Sequence[str]) -> None:
        """The engines that there are now."""
        self._targets = targets
        for target in (target for target in targets if target not in self._links):
            link = self._links[target] = self._make_link(target)
            if self._is_running:
                log.info("engine joins", target=target)
                self._run(link)
        self._routes.set_links(list(self._links.values()))
        for target, link in list(self._links.items()):
            is_leaving = target not in targets
            if is_leaving and not link.is_leaving:
                log.info("engine leaves", target=target, live=link.num_live)
            link.set_leaving(is_leaving)
            if is_leaving and not link.is_up and target in self._tasks:
                self._tasks[target].cancel()

    async def close(self) -> None:
        """End all links."""
        self._is_running = False
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _run(self, link: EngineLink) -> None:
        task = self._tasks[link.target] = asyncio.create_task(link.run())
        task.add_done_callback(lambda task: self._on_end(link, task))

    def _on_end(self, link: EngineLink, task: asyncio.Task[None]) -> None:
        """The link has ended and is forgotten. Its engine may have come back meanwhile: it gets another."""
        if not self._is_running:
            return
        if not task.cancelled() and (error := task.exception()) is not None:
            log.failure("a link ended by itself", error, target=link.target)
        del self._links[link.target], self._tasks[link.target]
        self.set_targets(self._targets)
