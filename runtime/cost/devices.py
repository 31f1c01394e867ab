"""Devices, prices, and what others published: the reference data, typed, with source and date on every row.

The rows are `data/reference-numbers.json`. A device is what the cost model needs of hardware: peak rates, bandwidth and memory,
either a datasheet's or, for the machine at hand, measured ones (`measured`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from importlib.resources import files
from typing import Any, TypeVar

from pagemill.errors import ConfigError

T = TypeVar("T")

SCHEMA = "pagemill-reference-numbers/1"
HOURS_A_MONTH = 730.0


@dataclass(frozen=True)
class Device:
    """Hardware limits: operations a second by arithmetic, bytes a second, bytes."""

    id: str
    name: str
    flops: Mapping[str, float]
    """Operations a second (two a multiply-add, dense) by arithmetic: float32, bfloat16, fp8, int8."""
    bandwidth: float
    """Bytes a second between memory and the arithmetic units."""
    memory: float
    """Bytes for weights, keys and values, and activations."""
    source: str
    watts: float | None = None
    attention: Mapping[str, float] = field(default_factory=dict)
    """Operations a second of the attention kernels, where they are known apart."""
    measured: bool = False
    """The rates were measured with the engine's own kernels: they are limits as they can be reached."""
    host: bool = False
    """Pages are prepared on the cores that run the model."""

    def rate(self, arithmetic: str) -> float:
        """Operations a second; raises `ConfigError` where the device lacks the arithmetic."""
        rate = self.flops.get(arithmetic)
        if not rate:
            raise ConfigError(f"{self.id} has no {arithmetic} arithmetic; it has {', '.join(self.flops)}")
        return rate


@dataclass(frozen=True)
class Price:
    """What one device, or one CPU instance, costs an hour."""

    device: str
    """Id of a GPU, or the name of an instance."""
    provider: str
    tier: str
    usd_per_hour: float
    date: str
    source: str
    verification: str
    note: str = ""

    @property
    def id(self) -> str:
        """`provider/device/tier`, by which `find_price` finds it."""
        return f"{self.provider}/{self.device}/{self.tier}".replace(" ", "-")

    @property
    def kind(self) -> str:
        """`spot` (may be taken away), `serverless` (by the second, while it runs) or `on-demand`."""
        if "serverless" in self.tier:
            return "serverless"
        return "spot" if self.tier.split()[0] in ("spot", "marketplace") else "on-demand"


@dataclass(frozen=True)
class Instance:
    """A rentable CPU machine."""

    instance: str
    provider: str
    vcpus: int
    memory_gib: float
    isa: str
    usd_per_hour: float | None
    tier: str
    date: str
    source: str
    verification: str


@dataclass(frozen=True)
class ApiPrice:
    """What a hosted service asks, by the page or by the token, in dollars."""

    provider: str
    product: str
    date: str
    source: str
    verification: str
    usd_per_1k_pages: float | None = None
    batch_usd_per_1k_pages: float | None = None
    usd_per_m_input: float | None = None
    usd_per_m_output: float | None = None
    batch_usd_per_m_input: float | None = None
    batch_usd_per_m_output: float | None = None
    tiers: tuple[Mapping[str, float | None], ...] = ()
    note: str = ""

    @property
    def id(self) -> str:
        """`provider/product`."""
        return f"{self.provider}/{self.product}".replace(" ", "-")

    def usd_per_page(self, input_tokens: float, output_tokens: float, *, batch: bool = False) -> float | None:
        """Dollars for one page; the token counts matter where tokens are what is sold. None if there is no batch price."""
        pages = self.batch_usd_per_1k_pages if batch else self.usd_per_1k_pages
        if pages is not None:
            return pages / 1000
        given, taken = self.usd_per_m_input, self.usd_per_m_output
        if batch:
            given, taken = self.batch_usd_per_m_input, self.batch_usd_per_m_output
        if given is None or taken is None:
            return None
        return (given * input_tokens + taken * output_tokens) / 1e6


@dataclass(frozen=True)
class Score:
    """A published benchmark score."""

    model: str
    benchmark_score: float
    degeneration_rate: float | None
    source: str
    verification: str
    note: str = ""


@dataclass(frozen=True)
class Throughput:
    """A published speed of a system on a card."""

    system: str
    params_b: float
    gpu: str
    engine: str
    pages_per_s: float
    source: str
    verification: str
    output_tokens_per_s: float | None = None
    date: str = ""
    note: str = ""


@dataclass(frozen=True)
class Reference:
    """All rows of the reference data."""

    collected: str
    gpus: tuple[Device, ...]
    prices: tuple[Price, ...]
    instances: tuple[Instance, ...]
    api_prices: tuple[ApiPrice, ...]
    scores: tuple[Score, ...]
    throughputs: tuple[Throughput, ...]


@lru_cache(maxsize=1)
def reference() -> Reference:
    """Read the reference data that comes with the package."""
    data = json.loads((files("pagemill.cost") / "data" / "reference-numbers.json").read_text("utf-8"))
    if data.get("schema") != SCHEMA:
        raise ConfigError(f"reference-numbers.json is of schema {data.get('schema')!r}, not {SCHEMA!r}")
    prices = [
        dict(row, device=row["gpu"], usd_per_hour=row["usd_per_gpu_hour"]) for row in data["gpu_prices"]
    ]
    prices += [
        dict(row, device=row["instance"]) for row in data["cpu_instance_prices"] if row["usd_per_hour"]
    ]
    return Reference(
        collected=data["collected"],
        gpus=tuple(_gpu(row) for row in data["gpus"]),
        prices=tuple(_row(Price, row) for row in prices),
        instances=tuple(_row(Instance, row) for row in data["cpu_instance_prices"]),
        api_prices=tuple(
            _row(ApiPrice, dict(row, tiers=tuple(row.get("tiers", ())))) for row in data["api_prices"]
        ),
        scores=tuple(_row(Score, row) for row in data["benchmark_scores"]),
        throughputs=tuple(_row(Throughput, row) for row in data["published_throughput"]),
    )


def _row(kind: type[T], row: Mapping[str, Any]) -> T:
    return kind(**{f.name: row[f.name] for f in fields(kind) if f.name in row})  # type: ignore[arg-type]


def _gpu(row: Mapping[str, Any]) -> Device:
    rates = {"bfloat16": row["bf16_tflops"], "fp8": row["fp8_tflops"], "int8": row["int8_tops"]}
    return Device(
        id=row["id"],
        name=row["name"],
        flops={arithmetic: 1e12 * rate for arithmetic, rate in rates.items() if rate},
        bandwidth=1e9 * row["memory_bandwidth_gbs"],
        memory=1e9 * row["memory_gb"],
        source=row["source"],
        watts=row["tdp_w"],
    )


def find_device(id: str) -> Device:
    """Return a GPU by its id, such as `h100-sxm`. Raises `ConfigError`, naming those there are."""
    for device in reference().gpus:
        if device.id == id:
            return device
    raise ConfigError(f"unknown device {id!r}; known are {', '.join(d.id for d in reference().gpus)}")


def find_price(device: str, which: str = "on-demand") -> Price:
    """Return what a device costs an hour, `which` being a number of dollars, a kind, a provider, or a price's id.

    A kind (on-demand, spot, serverless) gives the median offer of that kind, a provider its cheapest; of prices of one offer the
    newest counts. Raises `ConfigError`, naming the ids that exist for the device.
    """
    try:
        dollars = float(which)
    except ValueError:
        pass
    else:
        if not 0 < dollars < 1e6:
            raise ConfigError(f"a price should be dollars an hour above zero, got {which}")
        return Price(device, "given", "given", dollars, "", "given by the user", "given")
    newest: dict[str, Price] = {}
    for price in reference().prices:
        if price.device == device and not price.tier.startswith("as used by"):
            known = newest.get(price.id)
            if known is None or price.date > known.date:
                newest[price.id] = price
    offers = sorted(newest.values(), key=lambda price: (price.usd_per_hour, price.id))
    if not offers:
        raise ConfigError(f"no price is known for {device!r}; give one in dollars an hour")
    if which in newest:
        return newest[which]
    if same_kind := [price for price in offers if price.kind == which]:
        return same_kind[(len(same_kind) - 1) // 2]
    for price in offers:
        if price.provider == which:
            return price
    raise ConfigError(
        f"unknown price {which!r} of {device}; give dollars an hour, or one of {_listed(p.id for p in offers)}"
    )


def find_api(id: str) -> ApiPrice:
    """Return an API's price by its product, its `provider/product`, or the beginning of either.

    Raises `ConfigError`, naming those there are.
    """
    wanted = id.lower().replace(" ", "-")
    beginning: ApiPrice | None = None
    for price in reference().api_prices:
        for name in (price.id.lower(), price.id.lower().partition("/")[2]):
            if name == wanted:
                return price
            if name.startswith(wanted) and beginning is None:
                beginning = price
    if beginning is None or not wanted:
        raise ConfigError(f"unknown API {id!r}; known are {_listed(p.id for p in reference().api_prices)}")
    return beginning


def _listed(ids: Iterable[str]) -> str:
    return ", ".join(ids)


def measured(
    id: str,
    *,
    flops: Mapping[str, float],
    bandwidth: float,
    memory: float,
    source: str,
    attention: Mapping[str, float] | None = None,
    host: bool = True,
) -> Device:
    """The machine at hand, from measured operations and bytes a second. Raises `ConfigError` for numbers that cannot be."""
    attention = attention or {}
    numbers = {"bandwidth": bandwidth, "memory": memory, **flops, **attention}
    for name, value in numbers.items():
        if not 0 < value < float("inf"):
            raise ConfigError(f"a measured {name} should be above zero and finite, got {value!r}")
    if not flops:
        raise ConfigError("a measured device needs the rate of at least one arithmetic")
    return Device(
        id, id, dict(flops), bandwidth, memory, source, attention=dict(attention), measured=True, host=host
    )
