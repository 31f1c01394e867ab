"""Every error a user can meet: one sentence that says what, where, and what to do."""

import re

_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return one line that is safe to show: control, direction and non-UTF-8 characters of names as escapes."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class PagemillError(Exception):
    """Base of all errors that pagemill raises on purpose."""


class ConfigError(PagemillError):
    """An option has a value that cannot work."""


class CheckpointError(PagemillError):
    """A checkpoint cannot be found, read, or run; names the file or the weight."""


class PageError(PagemillError):
    """A page cannot be opened, decoded or prepared; names the file and the page."""


class RequestError(PagemillError):
    """A request cannot be served as asked (too long for the context, malformed prompt)."""


class KernelUnavailable(PagemillError):
    """No implementation of a kernel takes what was asked; lists what was tried."""


class DeviceError(PagemillError):
    """A device's engine has ended, or cannot go on; names the device and how it ended."""


class OutputError(PagemillError):
    """Results cannot be written where they were asked for; names the file and what is safe so far."""


def sentence(error: Exception) -> str:
    """Return one line of bounded length, whatever the error says."""
    text = str(error) if isinstance(error, PagemillError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:500]
