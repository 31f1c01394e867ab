"""What to read: inputs as the user named them, as a list of files without repetitions."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

from pagemill.errors import PageError
from pagemill.pages.source import expand_inputs, list_pages
from pagemill.results import PageResult

PageKey = tuple[str, int]
"""A page's identity within a run: the file's absolute path and the page number."""

_MANY_PAGES = {".pdf", ".tif", ".tiff"}


def page_key(source: str, page: int) -> PageKey:
    """Return the identity of a page, the same for `a.png`, `./a.png` and the absolute path.

    Symbolic links are not followed: a link farm is a legitimate way to name the same scan twice.
    """
    return os.path.abspath(source), page


@dataclass(frozen=True)
class Inputs:
    """The files of a run, in the order of the output."""

    sources: list[str]
    """Files as the engine gets them; each file once, under the first name it was given."""
    unreadable: list[PageResult] = field(default_factory=list)
    """One error record for each input that matched no file."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Absolute path → place in the output, unreadable inputs included."""
    repeated: int = 0
    """How many names were dropped because they named a file given before."""


def list_inputs(inputs: Sequence[str]) -> Inputs:
    """Expand files, folders and globs; drop repetitions.

    An input that matches nothing becomes an error record, so that it does not take the others down.

    Raises:
        PageError: no input matched any file.
    """
    sources: dict[str, str] = {}
    unreadable: dict[str, PageResult] = {}
    ranks: dict[str, int] = {}
    found = 0
    for given in inputs:
        try:
            names = expand_inputs([given])
        except PageError as error:
            found += 1
            path = os.path.abspath(given)
            ranks.setdefault(path, len(ranks))
            unreadable.setdefault(
                path, PageResult(given, 1, "error", finish_reason="error", error=str(error))
            )
            continue
        found += len(names)
        for name in names:
            path = os.path.abspath(name)
            ranks.setdefault(path, len(ranks))
            sources.setdefault(path, name)
    if not sources:
        errors = [str(result.error) for result in unreadable.values()]
        raise PageError(errors[0] if errors else "no inputs were given: name files, folders or globs.")
    return Inputs(list(sources.values()), list(unreadable.values()), ranks, repeated=found - len(ranks))


def count_pages(inputs: Inputs) -> Iterator[tuple[int, bool]]:
    """Count pages without reading them; yields `(pages_so_far, complete)` after each file that took time.

    Images count as one page by their suffix alone; PDF and TIFF files are opened for their page count.
    """
    several = [name for name in inputs.sources if PurePath(name).suffix.lower() in _MANY_PAGES]
    pages = len(inputs.sources) - len(several) + len(inputs.unreadable)
    yield pages, not several
    for index, name in enumerate(several, start=1):
        try:
            pages += sum(1 for _ in list_pages(name))
        except PageError:
            pages += 1  # an unreadable file is one error record
        yield pages, index == len(several)
