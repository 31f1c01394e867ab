"""The simulator: the engine's own scheduler and cache, with the cost model's time in place of a model. Deterministic.

Every decision (who is admitted, which chunk runs, who is preempted, which blocks are found again) is `Scheduler`'s and
`BlockPool`'s own. What is drawn is how long pages are and which of them loop; what is computed is how long a step takes.

Skipping. Between two events (an end, a loop's verdict, an admission, an arrival) nothing is decided: every sequence gets one
token a step. Such sequences are parked outside the scheduler's list, and when something happens to one it catches up as if the
tokens in between had been an accepted draft, which the scheduler plans and books as it does any draft. So an event costs what it
changes, not what the batch holds. The pool must have room for what parked sequences owe it; where it is short of that, all are
unparked and every step is planned in full. The clock counts whole femtoseconds, so that a hundred steps at once end at exactly
the moment of a hundred steps one by one, and both give the same result to the last digit.
"""

from __future__ import annotations

import math
from array import array
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from operator import attrgetter
from struct import Struct
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pagemill.cache import BlockPool, ImageCache
from pagemill.cost.model import PageStats, StepCost, memory
from pagemill.decode.control import Control
from pagemill.decode.sampler import SamplingParams
from pagemill.errors import ConfigError
from pagemill.results import FinishReason
from pagemill.scheduler import Scheduler, StepPlan
from pagemill.sequence import Sequence, SequenceImage, Timeline

Guard = Literal["off", "stop", "rescue"]
Order = Literal["arrival", "shortest", "longest", "oracle"]

_FS = 1e15  # femtoseconds a second
_TOKEN, _STOP = 0, 1
_STOPS = frozenset({_STOP})
_digest_of = Struct("<qii").pack
_ORDER = attrgetter("order")
_NO_LEVELS: npt.NDArray[np.float32] = np.empty((3, 0), np.float32)
_NO_PATCHES: npt.NDArray[np.uint8] = np.empty((0, 0), np.uint8)
_NO_POSITIONS: npt.NDArray[np.int32] = np.empty((3, 0), np.int32)
_PARAMS = SamplingParams()
_CONTROL = Control(_PARAMS)
_COLUMNS: dict[str, type] = {
    "page": np.int64,
    "arrived": np.float64,
    "scheduled": np.float64,
    "first_token": np.float64,
    "finished": np.float64,
    "output": np.int64,
    "degenerate": np.bool_,
    "looped": np.bool_,
}


@dataclass(frozen=True)
class Degeneration:
    """Pages that begin to repeat themselves, and what is done about it."""

    rate: float = 0.0
    """Share of pages; which ones is drawn, how many is not."""
    guard: Guard = "off"
    """`off`: they run to the cap. `stop`: they end when the loop is found. `rescue`: they are rolled back and go on."""
    detect_tokens: int = 300
    """Tokens of a loop until it is found; 290 (median) to 630 (p90) with the guard of pagemill.decode.loops."""
    rescued: float = 0.8
    """Share of rescued pages that end well; the others loop once more and are then ended."""

    def __post_init__(self) -> None:
        for name in ("rate", "rescued"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"the {name} of degeneration should be a share from 0 to 1, got {getattr(self, name)!r}"
                )
        if self.guard not in ("off", "stop", "rescue"):
            raise ConfigError(f"guard should be off, stop or rescue, got {self.guard!r}")
        if self.detect_tokens < 1:
            raise ConfigError(f"a loop is found after at least one token, got {self.detect_tokens}")


@dataclass(frozen=True)
class Workload:
    """Pages to read. Lengths are drawn by `stats`, or taken in turn from `lengths`, pairs of image and output tokens."""

    pages: int
    stats: PageStats = field(default_factory=PageStats)
    lengths: tuple[tuple[int, int], ...] = ()
    degeneration: Degeneration = field(default_factory=Degeneration)
    max_new_tokens: int = 8192
    pages_per_day: float | None = None
    """None: all are there at the start. Else they arrive at random (Poisson), by `day_profile`."""
    day_profile: tuple[float, ...] = (1.0,) * 24
    """Weights of the day's hours, from midnight, when the simulation starts."""
    order: Order = "arrival"
    """Of pages that are all there: as they come, by image tokens, or (oracle) the longest output first."""
    interactive: float = 0.0
    """Share of pages, at random, that are served before the others."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pages < 1:
            raise ConfigError(f"the workload is empty: {self.pages} pages")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens should be at least 1, got {self.max_new_tokens}")
        if self.pages_per_day is not None and not 0 < self.pages_per_day < math.inf:
            raise ConfigError(f"pages a day should be above 0, got {self.pages_per_day!r}")
        if len(self.day_profile) != 24 or min(self.day_profile) < 0 or not sum(self.day_profile) > 0:
            raise ConfigError("a day's profile should be 24 weights of at least 0, not all of them 0")
        if self.order not in ("arrival", "shortest", "longest", "oracle"):
            raise ConfigError(f"order should be arrival, shortest, longest or oracle, got {self.order!r}")
        if self.order != "arrival" and self.pages_per_day is not None:
            raise ConfigError("an order can be given to pages that are all there, not to pages that arrive")
        if not 0 <= self.interactive <= 1:
            raise ConfigError(f"the interactive share should be from 0 to 1, got {self.interactive!r}")


@dataclass(frozen=True)
class Settings:
    """The engine that reads them; names as in `EngineConfig`."""

    max_num_seqs: int = 256
    kv_cache_bytes: float | None = None
    """None takes what the device has left."""
    max_step_tokens: int = 2048
    max_step_image_tokens: int = 4096
    block_size: int = 16
    host_cores: int = 8
    """That prepare pages, where the device does not do it itself."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_step_tokens", "max_step_image_tokens", "block_size", "host_cores"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} should be at least 1, got {getattr(self, name)!r}")
        if self.max_step_tokens <= self.max_num_seqs:
            raise ConfigError(
                f"a step of {self.max_step_tokens} tokens has no room for a prefill beside {self.max_num_seqs} pages; "
                "raise max_step_tokens or lower the concurrency"
            )


@dataclass(slots=True, eq=False)
class _Page(Sequence):
    """A sequence with its fate: output lengths at which something happens to it, the last one first."""

    fate: list[tuple[int, str]] = field(default_factory=list)
    """(output tokens, "stop" | "length" | "loop" | "rescue"); a rescue goes back to `resume`."""
    resume: int = 0
    loops: bool = False
    number: int = 0
    """Its place in the workload."""
    version: int = 0
    """Rollbacks so far: tokens that replace others have digests of their own."""
    synced: int = -1
    """Step up to which its tokens are booked, while it is parked; else -1."""

    def digests(self, count: int, block_size: int) -> list[bytes]:
        """Stand-ins for content digests: equal for the prompt's common beginning, else every page's own."""
        known = self.block_digests
        common = self.images[0].start // block_size
        for i in range(len(known), count):
            known.append(_digest_of(-1, i, 0) if i < common else _digest_of(self.id, i, self.version))
        return known[:count]


@dataclass
class _Totals:
    """Exact sums over steps; times in femtoseconds."""

    prepare: int = 0
    vision: int = 0
    prefill: int = 0
    decode: int = 0
    guidance: int = 0
    idle: int = 0
    steps: int = 0
    planned_steps: int = 0
    row_time: int = 0
    """Running pages x time."""
    context_time: int = 0
    """Tokens in the cache x time."""
    peak_context: int = 0
    prompt_tokens: int = 0
    degenerate: int = 0
    discarded: int = 0
    recomputed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What came out. Per-page arrays are in order of completion; times in seconds from the start."""

    seconds: float
    steps: int
    planned_steps: int
    """Steps in which the scheduler was asked; the others were skipped."""
    page: npt.NDArray[np.int64]
    arrived: npt.NDArray[np.float64]
    scheduled: npt.NDArray[np.float64]
    first_token: npt.NDArray[np.float64]
    finished: npt.NDArray[np.float64]
    output: npt.NDArray[np.int64]
    degenerate: npt.NDArray[np.bool_]
    looped: npt.NDArray[np.bool_]
    stage_s: dict[str, float]
    """Seconds of the whole run by stage."""
    occupancy: float
    """Running pages as a share of `max_num_seqs`, mean over busy time."""
    kv_use: dict[str, float]
    """Tokens of running pages as a share of the KV cache's, mean over busy time, and peak; a token of a shared prefix counts for
    every page that has it."""
    preemptions: int
    prompt_tokens: int
    waste_tokens: dict[str, int]
    kv_cache_tokens: int

    @property
    def pages_per_s(self) -> float:
        """Pages a second over the whole run, its beginning and its tail included."""
        return len(self.page) / self.seconds

    def steady_pages_per_s(self) -> float:
        """Pages a second between the first and the last fifth of completions: what a long run settles at."""
        n = len(self.finished)
        first, last = n // 5, n - 1 - n // 5
        span = self.finished[last] - self.finished[first]
        return float((last - first) / span) if span > 0 else self.pages_per_s


def draw(workload: Workload) -> dict[str, npt.NDArray[Any]]:
    """Draw the pages: image and output tokens, which loop and where, who is interactive, when they arrive (seconds)."""
    random = np.random.default_rng(workload.seed)
    n, stats = workload.pages, workload.stats
    if workload.lengths:
        pairs = np.asarray(workload.lengths, dtype=np.int64)
        if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.min() < 1:
            raise ConfigError("lengths should be pairs of image and output tokens, at least 1 each")
        image, output = pairs[np.arange(n) % len(pairs)].T.astype(np.float64)
    else:
        sigma = stats.image_sigma
        ratio = np.exp(sigma * random.standard_normal(n) - sigma * sigma / 2)
        image = stats.image_tokens * ratio
        sigma = stats.output_sigma
        output = stats.output_tokens * ratio * np.exp(sigma * random.standard_normal(n) - sigma * sigma / 2)
    image = np.maximum(np.rint(image), 1).astype(np.int64)
    output = np.clip(np.rint(output), 1, workload.max_new_tokens).astype(np.int64)
    loops = random.permutation(n) < round(workload.degeneration.rate * n)
    arrive = np.zeros(n)
    if workload.pages_per_day is not None:
        # Exponential gaps in the time in which the rate is one, mapped through the day's cumulated rate.
        weights = np.asarray(workload.day_profile) / sum(workload.day_profile)
        day = np.concatenate([[0.0], np.cumsum(weights)])
        unit = np.cumsum(random.exponential(size=n)) / workload.pages_per_day
        whole = np.floor(unit)
        arrive = 86400 * whole + 3600 * np.interp(unit - whole, day, np.arange(25))
    return dict(
        image=image,
        output=output,
        loops=loops,
        loop_at=np.maximum(np.ceil(output * random.random(n)), 1).astype(np.int64),
        saved=random.random(n) < workload.degeneration.rescued,
        interactive=random.random(n) < workload.interactive,
        arrive=arrive,
    )


def simulate(workload: Workload, settings: Settings, cost: StepCost, *, skip: bool = True) -> Outcome:
    """Read the workload's pages. Without `skip` every step is planned one by one: the same result, slowly.

    Raises `ConfigError` if a page can never fit the KV cache, or the weights the device.
    """
    return _Simulation(workload, settings, cost, skip).run()


class _Simulation:
    def __init__(self, workload: Workload, settings: Settings, cost: StepCost, skip: bool) -> None:
        self.workload, self.settings, self.cost, self.skip = workload, settings, cost, skip
        self.drawn = draw(workload)
        block_size = settings.block_size
        text_tokens = workload.stats.text_tokens
        longest_prompt = int(self.drawn["image"].max()) + text_tokens
        longest = longest_prompt + workload.max_new_tokens
        self.capacity = _capacity(workload, settings, cost, longest)
        # More blocks than pages of full length could fill would only cost the simulator memory.
        most = settings.max_num_seqs * (-(-longest // block_size) + 1)
        self.blocks = BlockPool(min(self.capacity // block_size, most), block_size)
        self.scheduler = Scheduler(
            self.blocks,
            ImageCache[Any](2 * settings.max_step_image_tokens),
            max_num_seqs=settings.max_num_seqs,
            max_step_tokens=settings.max_step_tokens,
            max_step_image_tokens=settings.max_step_image_tokens,
        )
        self.now = self.step = self.next_id = 0
        self.totals = _Totals()
        self.rows: dict[str, array[Any]] = {
            name: array("d" if kind is np.float64 else "q") for name, kind in _COLUMNS.items()
        }
        self._decode_fs: dict[int, tuple[int, int]] = {}
        self._context_fs = round(cost.context_s * _FS)
        self._pages = self._ready_pages()
        self._next = next(self._pages, None)
        self.settled = False
        """The last plan admitted nobody for want of room, and nothing has changed since."""
        self.parked: dict[int, _Page] = {}
        self.parked_base = 0
        """Sum over the parked of tokens computed when they were parked, less the step at which that was."""
        self.parked_steps = 0
        """Sum over the parked of the step at which they were parked."""
        self.ends: list[tuple[int, int, int, _Page]] = []
        """Heap of (step in which something happens to a parked page, id, step at which it was parked, page)."""
        self.outgrows: list[tuple[int, int, int, _Page]] = []
        """Likewise, the step in which it outgrows the blocks it was admitted with."""
        self.evicted: set[_Page] = set()
        """Preempted, waiting to be admitted again: what they find depends on the order in which blocks are reused."""
        self.margin = (
            self.blocks.blocks_for(settings.max_step_tokens)
            + self.blocks.blocks_for(longest_prompt)
            + 2 * settings.max_num_seqs
        )

    def run(self) -> Outcome:
        scheduler, totals = self.scheduler, self.totals
        while True:
            self._feed()
            if not (self.parked or scheduler.has_work):
                if self._next is None:
                    break
                totals.idle += self._next[0] - self.now
                self.now = self._next[0]
            elif (steps := self._quiet_steps()) > 0:
                self._pass(steps)
            else:
                self._plan()
        scheduler.check()
        return self._outcome()

    def _ready_pages(self) -> Iterator[tuple[int, int, int]]:
        """Pages in order of service, as (moment it is prepared, moment it arrived, place in the workload)."""
        drawn, workload = self.drawn, self.workload
        order: npt.NDArray[np.int64] = np.arange(workload.pages)
        if workload.order == "oracle":
            lengths = np.where(drawn["loops"], workload.max_new_tokens, drawn["output"])
            order = np.argsort(-lengths, kind="stable")
        elif workload.order != "arrival":
            sign = 1 if workload.order == "shortest" else -1
            order = np.argsort(sign * drawn["image"], kind="stable")
        seconds = 0.0 if self.cost.device.host else self.cost.efficiency.prepare_s
        gap, ready = round(seconds * _FS / self.settings.host_cores), 0
        for number in order.tolist():
            arrived = round(float(drawn["arrive"][number]) * _FS)
            ready = max(ready, arrived) + gap
            yield ready, arrived, number

    def _feed(self) -> None:
        """Queue what is ready, but for memory's sake no more than the scheduler can come to."""
        scheduler, urgent = self.scheduler, self.workload.interactive > 0
        most = math.inf if urgent else 2 * self.settings.max_num_seqs
        while self._next is not None and self._next[0] <= self.now and scheduler.num_waiting < most:
            if urgent or not scheduler.num_waiting:
                self.settled = False
            scheduler.add(self._page(*self._next[1:]))
            self._next = next(self._pages, None)

    def _page(self, arrived: int, number: int) -> _Page:
        drawn, workload = self.drawn, self.workload
        image, text = int(drawn["image"][number]), workload.stats.text_tokens
        fate, resume = self._fate(number)
        self.next_id += 1
        return _Page(
            id=self.next_id,
            token_ids=[_TOKEN] * (image + text),
            num_prompt=image + text,
            images=[
                SequenceImage(
                    max(text - 8, 0),
                    image,
                    (1, 2, 2),
                    number.to_bytes(16, "little"),
                    _NO_LEVELS,
                    _NO_PATCHES,
                )
            ],
            positions=_NO_POSITIONS,
            position_delta=0,
            params=_PARAMS,
            max_tokens=image + text + workload.max_new_tokens,
            stop_ids=_STOPS,
            control=_CONTROL,
            priority=0 if drawn["interactive"][number] else 1,
            timeline=Timeline(arrived=arrived / _FS),
            fate=fate,
            resume=resume,
            loops=bool(drawn["loops"][number]),
            number=number,
        )

    def _fate(self, number: int) -> tuple[list[tuple[int, str]], int]:
        """What happens to a page at which output lengths, last first, and where a rescue goes back to."""
        drawn, cap, d = self.drawn, self.workload.max_new_tokens, self.workload.degeneration
        output = int(drawn["output"][number])
        good_end = (output, "length" if output >= cap else "stop")
        if not drawn["loops"][number]:
            return [good_end], 0
        start = int(drawn["loop_at"][number])
        found = start + d.detect_tokens
        if d.guard == "off" or found >= cap:
            return [(cap, "length")], 0
        if d.guard == "stop":
            return [(found, "loop")], 0
        saved = drawn["saved"][number] and output > start
        return [good_end if saved else (found, "loop"), (found, "rescue")], start

    def _quiet_steps(self) -> int:
        """Steps from here on in which every sequence gets one token and nothing is decided."""
        running = len(self.parked)
        if not self.settled or not running or self.scheduler.running:
            return 0
        steps = min(self._first(self.ends) - self.step, self._steps_of_room())
        if (
            steps > 0
            and self._next is not None
            and (self.workload.interactive or not self.scheduler.num_waiting)
            and self._elapsed(steps)[0] > self._next[0] - self.now
        ):
            low, high = 0, steps  # the first step to begin after the arrival
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (
                    (low, middle) if self._elapsed(middle)[0] >= self._next[0] - self.now else (middle, high)
                )
            steps = high
        return steps

    def _steps_of_room(self) -> int:
        """Steps for which the free blocks surely hold what parked sequences come to owe, and `margin` more."""
        running = len(self.parked)
        blocks = self.blocks.num_free - self.margin - running
        return (blocks * self.blocks.block_size + self.parked_steps) // running - self.step

    def _first(self, heap: list[tuple[int, int, int, _Page]]) -> int:
        """Step of the heap's first event that still stands."""
        while heap and heap[0][3].synced != heap[0][2]:
            heappop(heap)
        return heap[0][0] if heap else 1 << 62

    def _batch_fs(self, rows: int) -> tuple[int, int]:
        """Femtoseconds of a step of `rows` decoding sequences, without what their contexts cost: model, choice."""
        known = self._decode_fs.get(rows)
        if known is None:
            e = self.cost.efficiency
            model = self.cost.matmul_s(rows, rows) + e.step_s
            known = self._decode_fs[rows] = round(model * _FS), round(rows * e.row_s * _FS)
        return known

    def _elapsed(self, steps: int) -> tuple[int, int, int]:
        """What the next `steps` steps of the parked take: (time, of which choice, sum over steps of context x time)."""
        rows = len(self.parked)
        model, choice = self._batch_fs(rows)
        first = self.parked_base + rows * (self.step + 1)
        sum_1 = steps * (steps - 1) // 2
        sum_2 = (steps - 1) * steps * (2 * steps - 1) // 6
        contexts = steps * first + rows * sum_1
        squares = steps * first * first + 2 * first * rows * sum_1 + rows * rows * sum_2
        time = steps * (model + choice) + self._context_fs * contexts
        return time, steps * choice, (model + choice) * contexts + self._context_fs * squares

    def _pass(self, steps: int) -> None:
        """Let `steps` steps go by, all at once."""
        totals, rows = self.totals, len(self.parked)
        time, choice, context_time = self._elapsed(steps)
        self.now += time
        self.step += steps
        totals.steps += steps
        totals.decode += time - choice
        totals.guidance += choice
        totals.row_time += rows * time
        totals.context_time += context_time
        totals.peak_context = max(totals.peak_context, self.parked_base + rows * self.step)

    def _plan(self) -> None:
        """One step, planned and booked by the scheduler."""
        scheduler, totals = self.scheduler, self.totals
        if self.parked:
            self._unpark()
        parked_rows = len(self.parked)
        parked_context = self.parked_base + parked_rows * (self.step + 1)
        drafted = 0
        for seq in scheduler.running:
            if seq.draft:
                drafted += len(seq.draft)
        scheduler.max_step_tokens = tokens = self.settings.max_step_tokens - parked_rows + drafted
        before = scheduler.running.copy() if not parked_rows else []
        preemptions = scheduler.num_preemptions
        plan = scheduler.schedule(self.now / _FS)
        if scheduler.num_preemptions != preemptions:
            self.evicted.update(seq for seq in before if seq.row < 0)  # type: ignore[misc]
        time = self._book(plan, parked_rows, parked_context)
        self.now += time
        self.step += 1
        totals.steps += 1
        totals.planned_steps += 1

        new_tokens: list[list[int]] = []
        wanting: list[_Page] = []
        for seq, _, n, drafted in plan.work:
            tokens -= n
            gained = drafted + 1
            if gained > 0:
                assert isinstance(seq, _Page)
                length, fate = seq.fate[-1]
                new = [_TOKEN] * gained
                if fate == "stop" and length == len(seq.token_ids) - seq.num_prompt + gained:
                    new[-1] = _STOP
                new_tokens.append(new)
                wanting.append(seq)
                if len(seq.draft) >= gained:
                    raise AssertionError("a sequence caught up by fewer tokens than it owed")
        self.settled = tokens > 0
        ended = dict(scheduler.update(plan, new_tokens, [[]] * len(new_tokens), self.now / _FS))
        held = parked_context + sum(seq.num_computed for seq in scheduler.running)
        totals.row_time += (parked_rows + len(scheduler.running)) * time
        totals.context_time += held * time
        totals.peak_context = max(totals.peak_context, held)
        for page in wanting:
            page.draft = []
            length, fate = page.fate[-1]
            if (reason := ended.get(page)) is not None:
                self._finish(page, reason)
            elif len(page.token_ids) - page.num_prompt == length:
                if fate == "rescue":
                    self._rescue(page)
                else:
                    self._finish(page, "loop")
        if self.evicted:
            self.evicted = {page for page in self.evicted if page.row < 0}
        if self.skip:
            self._park()

    def _book(self, plan: StepPlan, rows: int, context: int) -> int:
        """Femtoseconds of a step: that of the plan, and of parked sequences (`rows`, with `context` tokens)."""
        cost, totals, e = self.cost, self.totals, self.cost.efficiency
        prefilled = wanted = attention = 0
        for seq, start, n, drafted in plan.work:
            if seq.draft or (n == 1 and start >= seq.num_prompt):
                rows += 1
                context += start + n
                continue
            prefilled += n
            wanted += drafted >= 0
            attention += round(cost.chunk_s(start, n) * _FS)
            if seq.num_preemptions:
                totals.recomputed += n
        attended = context * self._context_fs
        if not prefilled:
            model, choice = self._batch_fs(rows)
            totals.decode += model + attended
        else:
            matmul = round(cost.matmul_s(rows + prefilled, rows + wanted) * _FS)
            overhead, choice = round(e.step_s * _FS), round((rows + wanted) * e.row_s * _FS)
            model = matmul + attention + overhead
            prefill = matmul * prefilled // (rows + prefilled) + attention
            totals.prefill += prefill
            totals.decode += model - prefill + attended
        totals.guidance += choice
        time = model + choice + attended
        if plan.encode:
            vision = round(cost.vision_s([image.num_tokens for _, image in plan.encode]) * _FS)
            first = sum(not seq.num_preemptions for seq, _ in plan.encode)
            prepare = round(first * cost.prepare_s * _FS)
            totals.vision += vision
            totals.prepare += prepare
            time += vision + prepare
        return time

    def _finish(self, page: _Page, reason: FinishReason) -> None:
        self.settled = False
        output = len(page.token_ids) - page.num_prompt
        self.scheduler.finish(page, reason)
        timeline = page.timeline
        degenerate = reason == "loop" or (reason == "length" and page.loops)
        self.totals.prompt_tokens += page.num_prompt
        self.totals.degenerate += output if degenerate else 0
        values = (
            page.number, timeline.arrived, timeline.scheduled, timeline.first_token, self.now / _FS, output,
            degenerate, page.loops,
        )  # fmt: skip
        for column, value in zip(self.rows.values(), values, strict=True):
            column.append(value)

    def _rescue(self, page: _Page) -> None:
        self.settled = False
        self.totals.discarded += len(page.token_ids) - page.num_prompt - page.resume
        page.fate.pop()
        page.version += 1
        self.scheduler.rollback(page, page.num_prompt + page.resume)

    # Parking

    def _unpark(self) -> None:
        """Take back into the scheduler's list whom the coming step may touch, with the tokens that they owe as drafts."""
        if self.evicted or self._steps_of_room() < 1:
            for page in list(self.parked.values()):
                self._take_back(page)
            return
        for heap in (self.ends, self.outgrows):
            while self._first(heap) <= self.step:
                self._take_back(heappop(heap)[3])
        if self.parked and not self.scheduler.running:  # the scheduler lets anybody into an empty batch
            self._first(self.ends)
            self._take_back(heappop(self.ends)[3])

    def _take_back(self, page: _Page) -> None:
        page.draft = [_TOKEN] * (self.step - page.synced)
        del self.parked[page.id]
        self.parked_base -= page.num_computed - page.synced
        self.parked_steps -= page.synced
        page.synced = -1
        insort(self.scheduler.running, page, key=_ORDER)

    def _park(self) -> None:
        """Park every sequence that only decodes, if the pool has room for what they will owe."""
        scheduler, step, block_size = self.scheduler, self.step, self.blocks.block_size
        running = len(self.parked) + len(scheduler.running)
        if self.evicted or self.blocks.num_free < self.margin + 4 * running:
            return
        kept: list[Sequence] = []
        for page in scheduler.running:
            computed = page.num_computed
            if computed < page.num_prompt or len(page.token_ids) - computed > 1:
                kept.append(page)
                continue
            assert isinstance(page, _Page)
            page.synced = step
            self.parked[page.id] = page
            self.parked_base += computed - step
            self.parked_steps += step
            end = step + page.fate[-1][0] - (len(page.token_ids) - page.num_prompt) - 1
            heappush(self.ends, (end, page.id, step, page))
            outgrows = step + page.committed_blocks * block_size - computed
            if outgrows < end:
                heappush(self.outgrows, (outgrows, page.id, step, page))
        scheduler.running[:] = kept

    def _outcome(self) -> Outcome:
        totals = self.totals
        busy = max(self.now - totals.idle, 1)
        stages = ("prepare", "vision", "prefill", "decode", "guidance", "idle")
        columns: dict[str, Any] = {
            name: np.asarray(values).astype(_COLUMNS[name]) for name, values in self.rows.items()
        }
        return Outcome(
            seconds=self.now / _FS,
            steps=totals.steps,
            planned_steps=totals.planned_steps,
            **columns,
            stage_s={name: getattr(totals, name) / _FS for name in stages},
            occupancy=totals.row_time / (busy * self.settings.max_num_seqs),
            kv_use={
                "mean": totals.context_time / (busy * self.capacity),
                "peak": totals.peak_context / self.capacity,
            },
            preemptions=self.scheduler.num_preemptions,
            prompt_tokens=totals.prompt_tokens,
            waste_tokens={
                "degenerate": totals.degenerate,
                "discarded": totals.discarded,
                "padding": 0,
                "recompute": totals.recomputed,
                "rejected_drafts": 0,
            },
            kv_cache_tokens=self.capacity,
        )


def _capacity(workload: Workload, settings: Settings, cost: StepCost, longest: int) -> int:
    """Tokens that the KV cache holds."""
    room = memory(cost.shape, cost.precision, cost.device, workload.stats, settings.max_step_tokens)
    given, device = settings.kv_cache_bytes, cost.device
    if given is not None and given > room.kv:
        raise ConfigError(
            f"a KV cache of {given / 1e9:.1f} GB does not fit {device.id}: the weights leave {room.kv / 1e9:.1f} GB "
            f"of its {device.memory / 1e9:.1f} GB"
        )
    tokens = int((room.kv if given is None else given) / cost.shape.kv_bytes(cost.precision))
    tokens -= tokens % settings.block_size
    if tokens < longest:
        raise ConfigError(
            f"a page of up to {longest} tokens does not fit the KV cache on {device.id}, {tokens} tokens; "
            "give it more memory, or lower max_new_tokens"
        )
    return tokens
