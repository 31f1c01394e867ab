"""pagemill turns document pages into structured text at the lowest cost per page."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagemill.config import EngineConfig
    from pagemill.decode.guidance import Regex
    from pagemill.decode.sampler import SamplingParams
    from pagemill.engine import Engine, Request
    from pagemill.errors import PagemillError
    from pagemill.fleet import Fleet
    from pagemill.results import PageResult, RequestOutput

__version__ = version("pagemill")

_HOMES = {
    "Engine": "engine",
    "EngineConfig": "config",
    "Fleet": "fleet",
    "PageResult": "results",
    "PagemillError": "errors",
    "Regex": "decode.guidance",
    "Request": "engine",
    "RequestOutput": "results",
    "SamplingParams": "decode.sampler",
}
__all__ = [
    "Engine",
    "EngineConfig",
    "Fleet",
    "PageResult",
    "PagemillError",
    "Regex",
    "Request",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `pagemill --help` does not wait for torch.
    if name in _HOMES:
        return getattr(import_module(f"pagemill.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'pagemill' has no attribute {name!r}")
