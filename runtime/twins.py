"""Exact duplicates among the pages of a call: the first is read, the others get its answer."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from pagemill.results import PageResult

_MAX_ANSWERS = 4096  # finished pages of a call that later duplicates can be answered with: some 20 MB


class Twins:
    """Pages of one call by their content, so that an exact duplicate waits for the first one's answer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: OrderedDict[bytes, PageResult] = OrderedDict()
        self._followers: dict[bytes, list[Callable[[PageResult | None], None]]] = {}

    def join(self, content: bytes, follow: Callable[[PageResult | None], None]) -> bool:
        """False for the first page of this content, which has to `settle`. Else `follow` gets its answer, None if it failed."""
        with self._lock:
            if (answer := self._answers.get(content)) is None:
                followers = self._followers.get(content)
                if followers is None:
                    self._followers[content] = []
                    return False
                followers.append(follow)
                return True
        follow(answer)
        return True

    def settle(self, content: bytes, answer: PageResult) -> None:
        """Tell those who wait for this content's answer, and remember it for a while."""
        good = answer.status != "error"
        with self._lock:
            if good:
                self._answers[content] = answer
                if len(self._answers) > _MAX_ANSWERS:
                    self._answers.popitem(last=False)
            followers = self._followers.pop(content)
        for follow in followers:
            follow(answer if good else None)
