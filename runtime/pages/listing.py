"""The pages of what a caller names, one by one, and the records of those that cannot be read."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator, Sequence

from pagemill.errors import PagemillError
from pagemill.pages.source import PageRef, expand_inputs, list_pages
from pagemill.results import PageResult, Seconds

Inputs = str | os.PathLike[str] | PageRef | Sequence[str | os.PathLike[str] | PageRef]
"""What `Engine.read` takes: image files, PDFs, folders, globs and single pages."""


def find_pages(
    inputs: Inputs, skip: Container[tuple[str, int]], model: str
) -> Iterator[PageRef | PageResult]:
    """Yield the pages of `inputs` that are not in `skip`, lazily; a failed result for what cannot be listed."""
    several = [inputs] if isinstance(inputs, str | os.PathLike | PageRef) else inputs
    given = [i if isinstance(i, PageRef) else os.fspath(i) for i in several]
    return _find_pages(given, skip, model)


def _find_pages(
    inputs: list[str | PageRef], skip: Container[tuple[str, int]], model: str
) -> Iterator[PageRef | PageResult]:
    for given in inputs:
        if isinstance(given, PageRef):
            if (given.source, given.page) not in skip:
                yield given
            continue
        try:
            sources = expand_inputs([given])
        except PagemillError as error:
            if (given, 1) not in skip:
                yield failed_page(given, 1, str(error), model)
            continue
        for source in sources:
            page = 1
            try:
                for ref in list_pages(source):
                    page = ref.page + 1
                    if (ref.source, ref.page) not in skip:
                        yield ref
            except PagemillError as error:
                if (source, page) not in skip:
                    yield failed_page(source, page, str(error), model)


def failed_page(source: str, page: int, error: str, model: str, prepare: float = 0.0) -> PageResult:
    """Return the record of a page that could not be read, and why; `prepare` is the seconds spent on it."""
    if source not in error:  # every sentence says where
        error = f"{source} page {page}: {error}"
    seconds = Seconds(prepare=prepare)
    return PageResult(source, page, "error", finish_reason="error", seconds=seconds, model=model, error=error)
