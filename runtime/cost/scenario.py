"""What `pagemill simulate` answers: which device, how many, which concurrency, what a loop guard is worth.

Names in, a result file out. A scenario is one workload and every combination of devices, concurrencies, KV budgets and
guards; the simulator runs each, and the closed-form model stands beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from statistics import median
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pagemill.cost.bench import percentiles
from pagemill.cost.devices import Device, Price, find_api, find_device, find_price, measured
from pagemill.cost.environment import environment
from pagemill.cost.model import (
    GPU_EFFICIENCY,
    Efficiency,
    Money,
    Shape,
    StepCost,
    check_published,
    find_precision,
    find_shape,
    memory,
    predict,
)
from pagemill.cost.resultfile import SCHEMA
from pagemill.cost.simulator import Guard, Outcome, Settings, Workload, simulate
from pagemill.cost.units import number, percent, plural, seconds, usd, volume
from pagemill.errors import ConfigError

MACHINE_SCHEMA = "pagemill-machine/1"
_LARGEST_MACHINE = 1_000_000  # characters
_TIMELINE = 500  # pages of a run whose moments are kept
OFFICE_DAY = (0.2,) * 7 + (0.6, 1.6, 2.2, 2.2, 2.0, 1.4, 1.8, 2.2, 2.2, 2.0, 1.4, 0.8, 0.5) + (0.3,) * 4
"""Weights of the day's hours where most pages come in working hours."""


@dataclass(frozen=True)
class Scenario:
    """One workload, and what to try on it."""

    workload: Workload
    devices: tuple[str, ...] = ("h100-sxm",)
    shape: str = "3b"
    precision: str = "bfloat16"
    kv_cache_dtype: str = "auto"
    concurrency: tuple[int, ...] = (128,)
    kv_cache_gb: tuple[float | None, ...] = (None,)
    guards: tuple[Guard, ...] = ("rescue",)
    price: str = "on-demand"
    """What `find_price` takes."""
    utilisation: float = 0.7
    """Share of paid time in which pages are read; 1 where pages arrive by themselves, since idle time is simulated then."""
    pages_per_month: float = 1e6
    against: str | None = None
    """An API whose price to hold the runs against, as `find_api` takes it."""
    efficiency: Efficiency = GPU_EFFICIENCY
    step_tokens: int = 2048


def answer(scenario: Scenario, on_run: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Simulate every combination; `on_run` is told the name of each before it starts. Returns a result file's content.

    Raises `ConfigError` for a name that is not known, and where pages cannot fit.
    """
    if not (scenario.devices and scenario.concurrency and scenario.kv_cache_gb and scenario.guards):
        raise ConfigError("a simulation needs at least one device, concurrency, KV budget and guard")
    stats, load = scenario.workload.stats, scenario.workload
    shape, precision = (
        Shape(find_shape(scenario.shape)),
        find_precision(scenario.precision, scenario.kv_cache_dtype),
    )
    machines = {id: find_machine(id, scenario.efficiency) for id in scenario.devices}
    prices = {id: find_price(device.id, scenario.price) for id, (device, _) in machines.items()}
    api = None if scenario.against is None else find_api(scenario.against)
    paid = None if api is None else api.usd_per_page(stats.prompt_tokens, stats.output_tokens)
    utilisation = scenario.utilisation if load.pages_per_day is None else 1.0
    tries = list(product(scenario.devices, scenario.concurrency, scenario.kv_cache_gb, scenario.guards))
    runs: list[dict[str, Any]] = []
    for id, concurrency, kv_gb, guard in tries:
        device, efficiency = machines[id]
        settings = Settings(
            max_num_seqs=concurrency,
            kv_cache_bytes=None if kv_gb is None else kv_gb * 1e9,
            max_step_tokens=scenario.step_tokens,
        )
        cost = StepCost(shape, precision, device, efficiency)
        workload = replace(load, degeneration=replace(load.degeneration, guard=guard))
        name = _name(scenario, device.id, concurrency, kv_gb, guard)
        if on_run is not None:
            on_run(name)
        outcome = simulate(workload, settings, cost)
        run = {
            "name": name,
            "settings": {
                "device": device.id,
                "concurrency": concurrency,
                "kv_cache_gb": kv_gb,
                "guard": guard,
                "utilisation": utilisation,
            },
            "model": f"{scenario.shape} {precision.name}",
            **describe(outcome, workload, cost, settings),
        }
        run |= _priced(outcome.pages_per_s, prices[id], utilisation, scenario.pages_per_month, paid)
        runs.append(run)
    by_id = {price.id: price for price in prices.values()}
    only = next(iter(by_id.values())) if len(by_id) == 1 else None
    workload_facts = asdict(load) | {"distinct_pages": load.pages, "lengths": len(load.lengths) or "drawn"}
    return {
        "schema": SCHEMA,
        "kind": "simulation",
        "environment": environment(),
        "model": f"{scenario.shape} {precision.name}",
        "engine": {
            "shape": scenario.shape,
            "precision": asdict(precision),
            "parameters": shape.params,
            "max_step_tokens": scenario.step_tokens,
            "devices": {
                device.id: asdict(device) | {"efficiency": asdict(efficiency)}
                for device, efficiency in machines.values()
            },
        },
        "workload": workload_facts | {"pages_per_month": scenario.pages_per_month},
        "price": None
        if only is None
        else {"usd_per_hour": only.usd_per_hour, "source": f"{only.id}, {only.date}: {only.source}"},
        "prices": {id: asdict(price) for id, price in by_id.items()},
        "against": None
        if api is None
        else {"api": api.id, "usd_per_page": paid, "source": api.source, "date": api.date},
        "runs": runs,
    }


def words(text: str) -> tuple[str, ...]:
    """The words of a list separated by commas."""
    return tuple(word for part in text.split(",") if (word := part.strip()))


def integers(name: str, text: str) -> tuple[int, ...]:
    """The positive whole numbers of such a list. Raises `ConfigError`."""
    if not all(word.isdecimal() and 0 < int(word) < 1 << 16 for word in words(text)):
        raise ConfigError(
            f"--{name} should be whole numbers from 1 to {(1 << 16) - 1}, separated by commas, got {text!r}"
        )
    return tuple(int(word) for word in words(text))


def numbers(name: str, text: str) -> tuple[float | None, ...]:
    """The positive numbers of such a list. Raises `ConfigError`."""
    try:
        found = tuple(float(word) for word in words(text))
    except ValueError:
        found = (0.0,)
    if not all(0 < value < 1e6 for value in found):
        raise ConfigError(f"--{name} should be numbers above 0, separated by commas, got {text!r}")
    return found


def guards(text: str) -> tuple[Guard, ...]:
    """The guards of such a list. Raises `ConfigError`."""
    known: dict[str, Guard] = {"off": "off", "stop": "stop", "rescue": "rescue"}
    if unknown := [word for word in words(text) if word not in known]:
        raise ConfigError(f"--guard should be off, stop or rescue, got {unknown[0]!r}")
    return tuple(known[word] for word in words(text))


def find_machine(id: str, efficiency: Efficiency = GPU_EFFICIENCY) -> tuple[Device, Efficiency]:
    """Return a GPU of the reference data, with the efficiency given, or a measured machine with its own, from a `.json` file.

    Such a file is what `save_machine` writes. Raises `ConfigError` for one that is not.
    """
    if not id.endswith(".json"):
        return find_device(id), efficiency
    try:
        with open(id, encoding="utf-8") as file:
            found = json.loads(file.read(_LARGEST_MACHINE))
        if found["schema"] != MACHINE_SCHEMA:
            raise ValueError(f"schema {found['schema']!r}")
        device = measured(**found["device"])
        return device, Efficiency(**found["efficiency"])
    except OSError as error:
        raise ConfigError(f"{id} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{id} is no measured machine of this version ({type(error).__name__}: {error}); bench/cost_check.py writes one"
        ) from None


def save_machine(path: str, device: Device, efficiency: Efficiency) -> None:
    """Write a measured machine for `find_machine`."""
    names = ("id", "flops", "attention", "bandwidth", "memory", "source", "host")
    found = {name: value for name, value in asdict(device).items() if name in names}
    with open(path, "w", encoding="utf-8") as file:
        json.dump(
            {"schema": MACHINE_SCHEMA, "device": found, "efficiency": asdict(efficiency)}, file, indent=1
        )


def _name(scenario: Scenario, id: str, concurrency: int, kv_gb: float | None, guard: str) -> str:
    """What tells a run from the others."""
    words = [id]
    if len(scenario.concurrency) > 1:
        words.append(f"concurrency={concurrency}")
    if len(scenario.kv_cache_gb) > 1:
        words.append("kv=all" if kv_gb is None else f"kv={kv_gb:g} GB")
    if len(scenario.guards) > 1:
        words.append(f"guard={guard}")
    return ", ".join(words)


def describe(outcome: Outcome, workload: Workload, cost: StepCost, settings: Settings) -> dict[str, Any]:
    """The numbers of a run in the keys of a result file.

    Latencies count from a page's arrival, from its admission where all were there at the start.
    """
    n = len(outcome.page)
    begun = outcome.scheduled if workload.pages_per_day is None else outcome.arrived
    several = outcome.output > 1
    tpot = (outcome.finished - outcome.first_token)[several] / (outcome.output[several] - 1)
    kept = range(min(n, _TIMELINE))
    room = memory(cost.shape, cost.precision, cost.device, workload.stats, settings.max_step_tokens)
    kv = room.kv if settings.kv_cache_bytes is None else settings.kv_cache_bytes
    return {
        "pages": n,
        "seconds": outcome.seconds,
        "pages_per_s": outcome.pages_per_s,
        "steady_pages_per_s": outcome.steady_pages_per_s(),
        "model_pages_per_s": _modelled(cost, workload, settings),
        "tokens_per_s": {
            "prompt": outcome.prompt_tokens / outcome.seconds,
            "output": float(outcome.output.sum()) / outcome.seconds,
        },
        "latency_s": {
            "ttft": percentiles((outcome.first_token - begun).tolist()),
            "tpot": percentiles(tpot.tolist()),
            "page": percentiles((outcome.finished - begun).tolist()),
        },
        "stage_s_per_page": {name: value / n for name, value in outcome.stage_s.items()},
        "occupancy": outcome.occupancy,
        "kv_use": outcome.kv_use,
        "waste_tokens": outcome.waste_tokens,
        "preemptions": outcome.preemptions,
        "degenerate": int(outcome.degenerate.sum()),
        "steps": outcome.steps,
        "peak_memory_bytes": int(room.weights + room.workspace + kv),
        "energy_j": None,
        "quality": None,
        "timeline": [
            {
                "source": "simulated",
                "page": int(outcome.page[i]) + 1,
                "arrived": float(outcome.arrived[i]),
                "scheduled": float(outcome.scheduled[i]),
                "first_token": float(outcome.first_token[i]),
                "finished": float(outcome.finished[i]),
                "status": "degenerate" if outcome.degenerate[i] else "ok",
                "loops": int(outcome.looped[i]),
            }
            for i in kept
        ],
    }


def _modelled(cost: StepCost, workload: Workload, settings: Settings) -> float | None:
    """The closed form's pages a second, where it applies: no arrivals, no loops, everything fits."""
    if workload.pages_per_day is not None or workload.degeneration.rate or workload.lengths:
        return None
    try:
        return predict(
            cost,
            workload.stats,
            settings.max_num_seqs,
            count=workload.pages,
            max_step_tokens=settings.max_step_tokens,
            host_cores=settings.host_cores,
        ).pages_per_s
    except ConfigError:
        return None


def _priced(
    pages_per_s: float, price: Price, utilisation: float, pages_per_month: float, api: float | None
) -> dict[str, Any]:
    money = Money(price.usd_per_hour, pages_per_s, utilisation)
    return {
        "usd_per_hour": price.usd_per_hour,
        "usd_per_page": money.usd_per_page,
        "usd_per_million_pages": money.usd_per_million_pages,
        "devices_for_month": money.devices_for(pages_per_month),
        "usd_per_month": money.monthly_usd(pages_per_month),
        "break_even_pages_per_month": None if api is None else money.break_even(api),
    }


def show(result: dict[str, Any]) -> RenderableType:
    """Return the runs as tables, with what they assume."""
    runs, load = result["runs"], result["workload"]
    offline = load["pages_per_day"] is None
    stats, loops = load["stats"], load["degeneration"]["rate"]
    title = (
        f"{result['model']}, {plural(load['pages'], 'page')} a run, {number(stats['image_tokens'])} image and "
        f"{number(stats['output_tokens'])} output tokens, {percent(loops)} looping"
        + ("" if offline else f", {number(load['pages_per_day'])} pages a day")
    )
    names = [
        name for name in runs[0]["stage_s_per_page"] if any(run["stage_s_per_page"][name] for run in runs)
    ]
    speed = _table(
        "one device, simulated; times of a page from its " + ("admission" if offline else "arrival"),
        *("pages/s", "settled", "all read in", "page p50", "page p95"),
    )
    batch = _table(
        "share of places and KV cache taken; tokens of loops",
        *("batch", "KV mean", "KV peak", "preempted", "wasted"),
    )
    stages = _table("time of the device for a page", *names)
    api = result["against"]
    cost = _table(
        f"cost, and {volume(load['pages_per_month'])} pages a month",
        *("$/hour", "$/M pages", "devices", "$/month", *(["cheaper from"] if api else [])),
    )
    for run in runs:
        page, name = run["latency_s"]["page"], escape(run["name"])
        made = run["tokens_per_s"]["output"] * run["seconds"] + run["waste_tokens"]["discarded"]
        wasted = run["waste_tokens"]["degenerate"] + run["waste_tokens"]["discarded"]
        speed.add_row(
            name, number(run["pages_per_s"]), number(run["steady_pages_per_s"]), seconds(run["seconds"]),
            seconds(page["p50"]), seconds(page["p95"]),
        )  # fmt: skip
        batch.add_row(
            name, percent(run["occupancy"]), percent(run["kv_use"]["mean"]), percent(run["kv_use"]["peak"]),
            f"{run['preemptions']:,}", percent(wasted / made),
        )  # fmt: skip
        stages.add_row(name, *(seconds(run["stage_s_per_page"][name]) for name in names))
        even = run["break_even_pages_per_month"]
        cost.add_row(
            name, usd(run["usd_per_hour"]), usd(run["usd_per_million_pages"]), f"{run['devices_for_month']:,}",
            usd(run["usd_per_month"]), *([("never" if even is None else number(even))] if api else []),
        )  # fmt: skip
    parts: list[RenderableType] = [Text(title, style="bold")]
    for table in (speed, batch, stages, cost):
        parts += ["", table]
    parts.append("")
    if api:
        parts.append(
            Text(f"cheaper from so many pages a month than {api['api']} at {usd(api['usd_per_page'])} a page")
        )
    for price in result["prices"].values():
        dated = f" ({price['date']}, {price['source']})" if price["date"] else ""
        parts.append(
            Text(
                f"{price['device']}: {usd(price['usd_per_hour'])} an hour, {price['provider']} {price['tier']}{dated}"
            )
        )
    for id, device in result["engine"]["devices"].items():
        parts.append(Text(f"{id}: efficiencies {device['efficiency']['origin']}"))
    parts.append(Text(f"utilisation {percent(runs[0]['settings']['utilisation'])}"))
    return Group(*parts)


def show_published() -> RenderableType:
    """Return the model beside every published speed, and what share of the hardware's limit each system reaches."""
    table = _table(
        "published speeds beside the model, pages a second",
        *("card", "published", "predicted", "ratio", "limit", "reached", "assumed"),
    )
    table.columns[0].no_wrap = False
    table.columns[-1].justify, table.columns[-1].overflow = "left", "fold"
    checks = check_published()
    for check in checks:
        row = check.row
        table.add_row(
            escape(f"{row.system}, {row.engine}"), escape(row.gpu), number(row.pages_per_s), number(check.predicted),
            number(check.ratio), number(check.limit), percent(check.share_of_limit), escape(check.note),
        )  # fmt: skip
    reached = median(check.share_of_limit for check in checks if check.share_of_limit)
    return Group(
        table,
        "",
        Text(f"half of the systems reach less than {percent(reached)} of what the hardware allows"),
        Text(f"efficiencies {GPU_EFFICIENCY.origin}"),
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), title_style="bold")
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table
