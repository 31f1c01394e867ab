"""`pagemill bench`: what a run reads and when, what its numbers mean, and that an engine counts right."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from micro import Ask, asks, drain
from typer.testing import CliRunner

from pagemill import Engine, SamplingParams
from pagemill.cli import app
from pagemill.cost import bench, report, resultfile
from pagemill.cost import workload as asked
from pagemill.cost.meters import EnergyMeter, MemoryMeter
from pagemill.errors import ConfigError, PageError, PagemillError
from pagemill.pages.source import PageRef
from pagemill.results import PageResult, Seconds, TokenCounts
from pagemill.stats import EngineStats

PAGES = Path(__file__).parents[2] / "bench" / "pages"
REFS = [PageRef(f"{name}.png", 1) for name in "abcde"]


class FakeEngine:
    """Takes `page_s` for a page, one page at a time."""

    def __init__(self, places: int = 1, page_s: float = 0.0, threads: int = 0) -> None:
        self.places, self.threads, self.page_s = places, threads, page_s
        self.work, self.lock = threading.Lock(), threading.Lock()
        self.reads: list[tuple[str, str]] = []
        self.inside = self.most_inside = 0

    def read(self, ref, *, salt, params, resolution):
        with self.lock:
            self.inside += 1
            self.most_inside = max(self.inside, self.most_inside)
            self.reads.append((ref.source, salt))
        with self.work:
            time.sleep(self.page_s)
        with self.lock:
            self.inside -= 1
        error = "broken" if ref.source.startswith("bad") else None
        yield PageResult(
            ref.source,
            ref.page,
            "error" if error else "ok",
            text="text",
            tokens=TokenCounts(10, 12, 5),
            seconds=Seconds(decode=self.page_s / 2, prefill=self.page_s / 2),
            error=error,
        )

    def stats(self, *, restart_peak=False):
        return EngineStats(max_num_seqs=self.places, num_blocks=10)

    def describe(self):
        return {"max_num_seqs": self.places, "prepare_threads": self.threads}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def workload(pages=5, **more):
    return asked.Workload(["x"], REFS, pages, warmup=0, **more)


# What is read, and when.


@given(st.integers(1, 5), st.integers(1, 23), st.integers(0, 3))
def test_a_run_goes_over_the_pages_evenly(distinct, pages, seed):
    load = asked.Workload(["x"], REFS[:distinct], pages, seed)
    turns = list(load.turns())
    assert turns == list(load.turns())
    assert [turn for _, turn in turns] == [i // distinct for i in range(pages)]
    for first in range(0, pages, distinct):
        part = [ref for ref, _ in turns[first : first + distinct]]
        assert len(set(part)) == len(part)


def test_arrivals_are_a_poisson_process():
    load = replace(workload(20000), seed=3)
    times = load.arrivals(4.0)
    assert times == load.arrivals(4.0) != replace(load, seed=4).arrivals(4.0)
    gaps = np.diff([0.0, *times])
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / 4, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 4, rel=0.05)  # an exponential's deviation is its mean


def test_no_page_is_ever_read_twice_with_one_salt():
    engine = FakeEngine(places=2, threads=1)
    load = replace(workload(12), warmup=7, repeats=3)
    runs = asked.sweep(asked.Settings(concurrency=2), ["guard=off,stop", "drafts=auto,off"])
    result = bench.bench(load, runs, load=lambda settings: engine)
    assert len(result["runs"]) == 4
    assert len(engine.reads) == 4 * (7 + 3 * 12)
    assert len(set(engine.reads)) == len(engine.reads)


def test_no_more_pages_are_in_flight_than_read_keeps():
    engine = FakeEngine(places=3, page_s=0.001, threads=2)
    bench.drive(engine, workload(40), asked.Settings(), "s")
    assert engine.most_inside <= 3 + 2 * 2


def test_waiting_counts_at_a_rate_and_not_offline():
    engine = FakeEngine(places=1, page_s=0.01)
    settings = asked.Settings(rate=1e5)
    seen = bench.drive(engine, workload(10), settings, "s")
    at_rate = bench.summary(seen, engine.stats(), settings)["latency_s"]["page"]
    assert at_rate["p99"] > 0.08  # the last of ten pages that came at once
    offline = asked.Settings()
    seen = bench.drive(engine, workload(10), offline, "t")
    assert bench.summary(seen, engine.stats(), offline)["latency_s"]["page"]["p99"] == pytest.approx(0.01)


def test_pages_come_no_sooner_than_they_arrive():
    engine = FakeEngine(places=8)
    settings = asked.Settings(rate=200)
    load = workload(20)
    seen = bench.drive(engine, load, settings, "s")
    assert sorted(page.arrived for page in seen) == load.arrivals(200)
    assert all(page.finished >= page.arrived for page in seen)


def test_a_broken_file_is_a_page_that_fails(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    good = str(PAGES / "prose_00.png")
    load = asked.load_workload([good, str(tmp_path)], warmup=0)
    engine = FakeEngine()
    load = replace(load, refs=[replace(ref, source=Path(ref.source).name) for ref in load.refs])
    run, _ = bench.measure(engine, load, asked.Settings(), "s")
    assert (run["pages"], run["failed"]) == (1, 1)
    with pytest.raises(PageError, match=r"bad\.png"):
        asked.load_workload([str(tmp_path)])


# What the numbers mean.


def page(arrived, finished, status="ok", **more):
    result = PageResult(
        "p.png",
        1,
        status,
        tokens=TokenCounts(100, 120, 51),
        seconds=Seconds(queued=0.5, prepare=0.1, vision=0.2, prefill=0.3, decode=1.0),
        **more,
    )
    return bench._Seen(0, arrived, finished, result)


COUNTED = EngineStats(
    steps=10,
    encode_s=1.0,
    prefill_s=2.0,
    decode_s=3.0,
    masks_s=0.5,
    sampling_s=0.25,
    bookkeeping_s=0.25,
    place_seconds=14.0,
    kv_block_seconds=70.0,
    kv_peak_blocks=50,
    max_num_seqs=4,
    num_blocks=100,
    recompute_tokens=7,
    rejected_draft_tokens=8,
    discarded_tokens=9,
)


def test_the_numbers_of_a_run():
    seen = [page(0.0, 3.0), page(1.0, 8.0, "degenerate"), page(2.0, 2.5, "error", error="broken")]
    run = bench.summary(seen, COUNTED, asked.Settings(rate=1.0))
    assert (run["pages"], run["failed"], run["seconds"]) == (2, 1, 8.0)
    assert run["pages_per_s"] == 2 / 8
    assert run["tokens_per_s"] == {"prompt": 240 / 8, "output": 102 / 8}
    assert run["latency_s"]["ttft"]["p50"] == pytest.approx((2.0 + 6.0) / 2)  # finished - decode - arrived
    assert run["latency_s"]["ttft"]["p95"] == pytest.approx(2.0 + 0.95 * 4.0)
    assert run["latency_s"]["tpot"] == pytest.approx({"p50": 0.02, "p95": 0.02, "p99": 0.02})
    assert run["latency_s"]["page"]["p50"] == pytest.approx((3.0 + 7.0) / 2)
    stages = run["stage_s_per_page"]
    assert stages == pytest.approx(
        {"prepare": 0.1, "vision": 0.5, "prefill": 1.0, "decode": 1.75, "guidance": 0.25, "idle": 0.5}
    )
    assert sum(stages.values()) - stages["prepare"] == pytest.approx(run["seconds"] / run["pages"])
    assert run["occupancy"] == pytest.approx(14 / (7 * 4))
    assert run["kv_use"] == pytest.approx({"mean": 70 / (7 * 100), "peak": 0.5})
    assert run["waste_tokens"] == {
        **{"degenerate": 51, "discarded": 9, "padding": 0},
        **{"recompute": 7, "rejected_drafts": 8},
    }
    assert [row["finished"] for row in run["timeline"]] == [3.0, 8.0, 2.5]
    assert run["timeline"][2]["first_token"] is None


def test_offline_a_page_begins_when_it_is_taken_up():
    run = bench.summary([page(0.0, 30.0)], COUNTED, asked.Settings())
    assert run["latency_s"]["ttft"]["p50"] == pytest.approx(0.1 + 0.2 + 0.3)
    assert run["latency_s"]["page"]["p50"] == pytest.approx(0.1 + 0.2 + 0.3 + 1.0)


def test_pages_that_needed_no_model_have_no_latency():
    run = bench.summary([page(0.0, 1.0, shortcut="blank")], COUNTED, asked.Settings())
    assert run["pages"] == 1
    assert run["latency_s"]["ttft"] == {}


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=40))
def test_percentiles_are_linear_between_ranks(values):
    ordered = sorted(values)
    for name, p in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        place = p * (len(values) - 1)
        low = int(place)
        high = min(low + 1, len(values) - 1)
        expected = ordered[low] + (place - low) * (ordered[high] - ordered[low])
        assert bench.percentiles(values)[name] == pytest.approx(expected)


def test_a_run_without_a_page_read_is_an_error():
    engine = FakeEngine()
    load = asked.Workload(["x"], [PageRef("bad.png", 1)], 1, warmup=0)
    with pytest.raises(PageError, match="no page could be read: broken"):
        bench.measure(engine, load, asked.Settings(), "s")


def test_the_median_repeat_stands_for_all_and_is_priced(tmp_path):
    class Slower(FakeEngine):
        def read(self, ref, *, salt, **how):
            self.page_s = {"0": 0.002, "1": 0.02, "2": 0.008}[salt.split("/")[1]]
            return super().read(ref, salt=salt, **how)

    load = replace(workload(3), repeats=3)
    told = []
    result = bench.bench(
        load,
        asked.sweep(asked.Settings(), []),
        load=lambda settings: Slower(),
        price={"usd_per_hour": 7.2, "source": "a test"},
        on_result=lambda result: told.append(len(result["runs"])),
    )
    (run,) = result["runs"]
    assert told == [1]
    assert run["name"] == "concurrency=32, offline"
    assert run["pages_per_s"] == sorted(run["spread"])[1]
    assert run["usd_per_page"] == pytest.approx(7.2 / 3600 / run["pages_per_s"])
    assert run["usd_per_million_pages"] == pytest.approx(1e6 * run["usd_per_page"])
    file = tmp_path / "r.json"
    bench.write(result, str(file))
    assert json.loads(file.read_text()) == result
    assert [f.name for f in tmp_path.iterdir()] == ["r.json"]


# What is asked for.


def test_sweeps_multiply_and_runs_of_one_engine_lie_together():
    loads = []

    def load(settings):
        loads.append(settings.engine_options())
        return FakeEngine(places=settings.concurrency)

    runs = asked.sweep(asked.Settings(), ["rate=offline,50", "concurrency=1,2"])
    assert [name for name, _ in runs] == [
        "offline, concurrency=1",
        "rate=50, concurrency=1",
        "offline, concurrency=2",
        "rate=50, concurrency=2",
    ]
    result = bench.bench(workload(2), runs, load=load)
    assert [options["max_num_seqs"] for options in loads] == [1, 2]
    assert [run["settings"]["rate"] for run in result["runs"]] == [None, 50.0, None, 50.0]


def test_every_quantisation_is_an_engine_of_its_own_and_the_report_tells_them_apart(tmp_path):
    runs = asked.sweep(asked.Settings(), ["quantize=none,int8,int4", "concurrency=1,8"])
    options = [settings.engine_options() for _, settings in runs]
    assert [o.get("quantize") for o in options] == [None, None, "int8", "int8", "int4", "int4"]
    result = bench.bench(workload(3), runs, load=lambda settings: FakeEngine(places=settings.concurrency))
    bench.write(result, str(tmp_path / "r.json"))
    series = report._sweeps(resultfile.load([str(tmp_path / "r.json")]))
    assert [(one["label"], one["key"], len(one["points"])) for one in series] == [
        (f"pagemill-tiny, quantize {name}", "concurrency", 2) for name in ("none", "int8", "int4")
    ]
    small = asked.Settings(quantize="int8", kv_cache_dtype="int8")
    assert "quantize=int8, kv_cache_dtype=int8" in asked.sweep(small, [])[0][0]
    assert small.engine_options().items() >= {"quantize": "int8", "kv_cache_dtype": "int8"}.items()


@pytest.mark.parametrize(
    "sweeps",
    [
        ["quantize=int2"],
        ["colour=red"],
        ["concurrency"],
        ["concurrency="],
        ["concurrency=0"],
        ["concurrency=1,x"],
        ["rate=nan"],
        ["rate=-1"],
        ["dtype=float16"],
        ["resolution=27"],
        ["rate=1", "rate=2"],
        ["concurrency=" + ",".join(map(str, range(1, 300)))],
    ],
)
def test_bad_sweeps_are_one_sentence(sweeps):
    with pytest.raises(ConfigError, match=r"^[^\n]+\.$"):
        asked.sweep(asked.Settings(), sweeps)


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "no-such-card", "l4:nobody"])
def test_bad_prices_are_one_sentence(text):
    with pytest.raises(PagemillError, match=r"^[^\n]+$"):
        asked.price_of(text)


def test_prices():
    assert asked.price_of("0.5")["usd_per_hour"] == 0.5
    found = asked.price_of("l4:aws")
    assert found["usd_per_hour"] > 0
    assert "aws" in found["source"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["EMPTY"],
        ["nowhere.png"],
        ["--model", "/nowhere", "EMPTY/../page.png"],
        ["--truth", "nowhere.jsonl"],
        ["--sweep", "concurrency=none"],
        ["--price", "no-such-card"],
        ["-o", "/nowhere/result.json"],
        ["--device", "abacus"],
        ["--rate", "nan"],
        ["--pages", "0"],
    ],
)
def test_bad_input_exits_with_2(arguments, tmp_path):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "page.png").touch()
    arguments = [a.replace("EMPTY", str(tmp_path / "EMPTY")) for a in arguments]
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    assert done.stderr.strip()


def test_without_a_source_tree_the_samples_are_named(monkeypatch):
    monkeypatch.setattr(asked, "__file__", "/nowhere/site-packages/pagemill/cost/workload.py")
    with pytest.raises(PageError, match="name files or folders"):
        asked.load_workload([])


def test_energy_survives_a_counter_that_starts_again(tmp_path):
    for name in ("intel-rapl:0", "intel-rapl:0:0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "max_energy_range_uj").write_text("10000000\n")
        (tmp_path / name / "energy_uj").write_text("9000000\n")
    meter = EnergyMeter(powercap=tmp_path)
    assert meter.joules() == 0
    counter = tmp_path / "intel-rapl:0" / "energy_uj"
    counter.write_text("2000000\n")
    assert meter.joules() == pytest.approx(3)
    counter.write_text("2500000\n")
    assert meter.joules() == pytest.approx(3.5)
    assert EnergyMeter(powercap=tmp_path / "none").joules() is None


def test_memory_peaks_are_seen():
    meter = MemoryMeter()
    before = meter.peak()
    held = np.ones(8_000_000)
    assert meter.peak() - before > 0.5 * held.nbytes


# What an engine counts.


@settings(max_examples=40, deadline=None)
@given(st.lists(asks(), min_size=1, max_size=6), st.integers(8, 12))
def test_every_token_is_counted_once(world, wanted, num_blocks):
    core = world.core(num_blocks=num_blocks, block_size=4, prefix_sharing=False, max_num_seqs=4)
    room = 4 * num_blocks
    seqs = [world.add(core, ask) for ask in wanted if len(ask.prompt) + 30 < room]
    drain(core)
    stats = core.stats
    output = sum(len(seq.output_ids) for seq in seqs)
    assert stats.prefill_tokens == sum(seq.num_prompt for seq in seqs)
    assert stats.decode_tokens == output - len(seqs)  # the last token of each is not computed
    assert (stats.recompute_tokens > 0) == (core.scheduler.num_preemptions > 0)
    assert (stats.finished, stats.output_tokens) == (len(seqs), output)
    if seqs:
        assert 0 < stats.occupancy <= 1
        assert 0 < stats.kv_use <= stats.kv_peak_blocks / num_blocks <= 1
    assert stats.since(stats).busy_s == 0


def test_recompute_is_what_a_preemption_costs(world):
    core = world.core(num_blocks=8, block_size=4, prefix_sharing=False, max_num_seqs=2)
    core.scheduler.predictor.mean = core.scheduler.predictor.deviation = 0.0
    prompt = (3, 4, 5, 6, 7, 8)
    seqs = [world.add(core, Ask(prompt[: 6 - i], (), 20), ignore_eos=True) for i in range(2)]
    drain(core)
    assert core.scheduler.num_preemptions > 0
    total = core.stats.prefill_tokens + core.stats.decode_tokens + core.stats.recompute_tokens
    assert core.stats.recompute_tokens > 0
    assert core.stats.prefill_tokens == sum(seq.num_prompt for seq in seqs)
    assert total - core.stats.recompute_tokens == sum(len(seq.token_ids) - 1 for seq in seqs)


@pytest.fixture(scope="module")
def engine():
    with Engine.from_pretrained(max_num_seqs=4, num_threads=1) as engine:
        yield engine


def test_salts_share_no_work_and_change_no_page(engine):
    ref = PageRef(str(PAGES / "form_24.png"), 1)
    params = SamplingParams(max_new_tokens=100)
    seen = []
    for salt in ("a", "a", "b"):
        before = engine.stats()
        (result,) = engine.read(ref, salt=salt, params=params)
        seen.append((result, engine.stats().since(before)))
    first, again, other = seen
    assert first[0].raw == again[0].raw == other[0].raw
    for result, stats in seen:
        proposed, accepted = result.drafts
        assert stats.accepted_draft_tokens == accepted
        assert stats.rejected_draft_tokens == proposed - accepted
        assert stats.decode_tokens == result.tokens.output - 1
    assert again[1].accepted_draft_tokens > 2 * other[1].accepted_draft_tokens  # it remembered the page
    assert again[1].images == 0
    assert again[1].shared_tokens > 300
    assert other[1].images == first[1].images == 1
    assert other[1].prefill_tokens + other[1].shared_tokens == first[0].tokens.prompt
    assert other[1].shared_tokens < 40  # the instruction before the image


def test_one_page_of_a_document(engine):
    (result,) = engine.read(
        PageRef(str(PAGES / "digital_3p.pdf"), 2), params=SamplingParams(max_new_tokens=8)
    )
    assert (result.page, result.status) == (2, "ok")


def test_a_short_run_of_the_real_engine(tmp_path):
    out = tmp_path / "result.json"
    files = [str(PAGES / f"prose_0{i}.png") for i in (0, 1)]
    options = [
        "--pages=3",
        "--warmup=0",
        "--concurrency=2",
        "--threads=1",
        "--price=1",
        "--max-new-tokens=60",
    ]
    truth = ["--truth", str(PAGES / "truth.jsonl")]
    done = CliRunner().invoke(app, ["bench", *files, *options, *truth, "-o", str(out)])
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert (result["schema"], result["kind"], result["model"]) == (
        bench.SCHEMA,
        "bench",
        "pagemill-tiny",
    )
    (run,) = result["runs"]
    assert (run["pages"], run["failed"], run["quality"]["pages"]) == (3, 0, 2)
    assert run["stats"]["images"] == 3  # the page that came twice was read twice
    stages = run["stage_s_per_page"]
    assert all(stages[name] > 0 for name in ("prepare", "vision", "prefill", "decode", "guidance"))
    assert sum(stages.values()) - stages["prepare"] == pytest.approx(run["seconds"] / 3, rel=0.02)
    assert run["latency_s"]["ttft"]["p50"] < run["latency_s"]["page"]["p50"] <= run["seconds"]
    for row in run["timeline"]:
        moments = [row[name] for name in ("arrived", "scheduled", "first_token", "finished")]
        assert all(a <= b + 0.005 for a, b in pairwise(moments))
    assert "pages/s" in done.output
