"""Steering on the real engine core: drafts, guidance, rescue and retries give the same in any company, and cost what they should.

The reference of every request is itself alone, without drafts, with room to spare. Oracles, which know the reference's tokens,
and liars make the drafts; a detector that sees loops where there are none makes a random model need rescue often.
"""

import json
import math
import random
import re
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from micro import IMAGE, IMAGES, Ask, drain

import pagemill.core
from pagemill.decode.guidance import Regex
from pagemill.decode.loops import Loop
from pagemill.errors import RequestError
from pagemill.sequence import PageTask

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["invoice", "letter"]},
        "valid": {"type": "boolean"},
        "lines": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 3},
    },
    "required": ["kind", "valid", "lines"],
    "additionalProperties": False,
}
REGEX = Regex("(ab|c){2,5} total: [0-9]{1,4}[.,][0-9]{2} euro")
STOPS = (2034, 2036)


class TouchyDetector:
    """Calls it a loop at one place in ten or so, which the last tokens alone decide."""

    def __init__(self, pieces, expected_tokens=None):
        self.ids = []

    def push(self, token):
        self.ids.append(token)
        n, drawn = len(self.ids), random.Random(repr(self.ids[-3:]))
        period = drawn.choice([1, 2, 3])
        if n >= 3 * period and drawn.random() < 1 / 10:
            return Loop(drawn.choice(["run", "period", "counter"]), n - 2 * period, period, 3, n)
        return None

    def rollback(self, num_tokens):
        del self.ids[num_tokens:]


class Oracle:
    """Drafts from what followed each beginning of the reference, right as often as `truth` says, else nonsense."""

    acceptance = 0.9

    def __init__(self, followed, truth, seed):
        self.followed, self.truth, self.random = followed, truth, random.Random(seed)
        self.output = []

    def extend(self, token_ids):
        self.output += token_ids

    def rollback(self, num_tokens):
        del self.output[num_tokens:]

    def feedback(self, proposed, accepted):
        assert 0 <= accepted <= proposed

    def propose(self, limit):
        draft = []
        while len(draft) < limit:
            next_ones = self.followed.get((*self.output, *draft))
            if next_ones and self.random.random() < self.truth:
                draft.append(self.random.choice(next_ones))
            else:
                draft.append(self.random.choice([0, 1, 5, IMAGE, *STOPS, self.random.randrange(2000)]))
        return draft


@dataclass
class Outcome:
    """All that may not depend on company and drafts."""

    token_ids: list
    logprobs: list
    text: str
    finish_reason: str
    events: list
    attempts: list
    num_discarded: int
    error: str | None
    followed: dict = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, core, seq):
        attempts = [(a.token_ids, a.closing, a.degenerate, a.verdict) for a in seq.attempts]
        logprobs = [None if math.isnan(lp) else lp for lp in seq.logprobs]
        text, events = core.text_of(seq), list(seq.control.events)
        return cls(
            seq.output_ids, logprobs, text, seq.finish_reason, events, attempts, seq.num_discarded, seq.error
        )


def remember(seq):
    """Note every token the sequence's output takes, by what stood before it."""
    followed, output, control = {}, [], seq.control
    extend, rollback = control.extend, control.rollback

    def noting_extend(token_ids):
        for token in token_ids:
            followed.setdefault(tuple(output), []).append(token)
            output.append(token)
        return extend(token_ids)

    def noting_rollback(num_tokens):
        del output[num_tokens:]
        rollback(num_tokens)

    # What `add` appended already, forced by a guide.
    for token in seq.output_ids:
        followed.setdefault(tuple(output), []).append(token)
        output.append(token)
    control.extend, control.rollback = noting_extend, noting_rollback
    return followed


REFERENCES = {}


def reference(world, ask, page, params):
    key = repr((ask, page, sorted(params.items(), key=str)))
    if key not in REFERENCES:
        core = world.core(prefix_sharing=False, num_blocks=400, overlap=False)
        seq = world.add(core, ask, page=page and PageTask(**page), **{**params, "drafts": "off"})
        followed = remember(seq)
        drain(core)
        core.close()
        stops = [attempt.verdict.finish_reason for attempt in seq.attempts] or [seq.finish_reason]
        generated = sum(map(len, followed.values())) + stops.count("stop")
        assert generated == len(seq.output_ids) + seq.num_discarded or params.get("stop")
        REFERENCES[key] = Outcome.of(core, seq)
        REFERENCES[key].followed = followed
    return REFERENCES[key]


def is_valid(text, guidance):
    if guidance == "page":
        page = json.loads(text)
        assert "text" in page
        assert set(page) <= {"header", "margin", "footer", "text"}
        assert all(value is None or isinstance(value, str) for value in page.values())
    elif guidance is SCHEMA:
        value = json.loads(text)
        assert list(value) == ["kind", "valid", "lines"]
        assert value["kind"] in ("invoice", "letter")
        assert value["valid"] in (True, False)
        assert all(len(line) <= 6 for line in value["lines"])
        assert len(value["lines"]) <= 3
    elif isinstance(guidance, Regex):
        assert re.fullmatch(guidance.pattern, text)


@st.composite
def steered(draw):
    """A request with everything that may steer it: (ask, page, parameters, drafts)."""
    images = tuple(draw(st.lists(st.integers(0, len(IMAGES) - 1), max_size=1)))
    start, end = (tuple(draw(st.lists(st.integers(0, 5), max_size=4))) for _ in range(2))
    prompt = (*start, *(IMAGE for _ in images), *end) or (1,)
    ask = Ask(prompt, images, draw(st.sampled_from([26, 20, 14, 9, 5, 3, 2, 1])))
    params = dict(
        guidance=draw(st.sampled_from(["off", "page", SCHEMA, REGEX])),
        guard=draw(st.sampled_from(["off", "rescue", "stop", "rescue", "off"])),
        max_rescues=draw(st.integers(0, 3)),
    )
    if draw(st.integers(0, 3)) == 0:
        params.update(temperature=draw(st.sampled_from([0.3, 1.5])), seed=draw(st.integers(0, 3)))
        if draw(st.booleans()):
            params.update(top_p=0.8, repetition_penalty=1.2)
    if draw(st.integers(0, 5)) == 0:
        params.update(stop=draw(st.sampled_from([("e",), ('"',), ("0", "ab")])))
    elif draw(st.integers(0, 5)) == 0:
        params.update(ignore_eos=True)
    page = None
    if draw(st.booleans()):
        page = dict(num_glyphs=draw(st.sampled_from([None, 0, 5000])))
        params.update(max_retries=draw(st.integers(0, 2)))
    drafts = draw(st.sampled_from([1.0, 0.9, 0.7, 0.3, "own", "text", "off"]))
    return ask, page, params, drafts


@st.composite
def scenarios(draw):
    block_size = draw(st.sampled_from([1, 3, 4, 16]))
    return dict(
        requests=draw(st.lists(st.tuples(steered(), st.sampled_from([0, 1, 4])), min_size=2, max_size=5)),
        twin=draw(st.booleans()),
        cancel=draw(st.dictionaries(st.integers(0, 4), st.integers(0, 30), max_size=2)),
        longest=draw(st.sampled_from([16, 7, 2, 1])),
        hopeful=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
        engine=dict(
            block_size=block_size,
            num_blocks=draw(st.integers(-(-41 // block_size), -(-56 // block_size))),
            max_num_seqs=draw(st.sampled_from([4, 3, 2, 1])),
            max_step_tokens=draw(st.sampled_from([1, 2, 5, 17, 64])),
            max_step_image_tokens=draw(st.sampled_from([1, 6, 100])),
            prefix_sharing=draw(st.booleans()),
        ),
    )


def run(world, scenario):
    requests = scenario["requests"]
    if scenario["twin"]:
        requests = [*requests, requests[0]]
    core, lengths = world.core(**scenario["engine"]), random.Random(scenario["seed"])
    core.draft_budget.lengths = lambda acceptances, limit, *_: [
        lengths.randint(0, min(limit, scenario["longest"])) if a > 0 else 0 for a in acceptances
    ]
    if scenario["hopeful"]:  # it admits until blocks run out
        core.scheduler.predictor.mean = core.scheduler.predictor.deviation = 0.0
    sequences, step = {}, 0
    while step <= 4 or core.scheduler.has_work:
        for i, ((ask, page, params, drafts), arrival) in enumerate(requests):
            if arrival == step:
                expected = reference(world, ask, page, params)
                task = page and PageTask(**page)
                if drafts == "text":
                    task = task or PageTask()
                    task.texts = [[1, 2, 3], expected.token_ids[:-1]]
                seq = world.add(core, ask, page=task if page else None, drafts="auto", **params)
                if drafts == "off" or seq.control.drafter is None:
                    seq.control.drafter = None
                elif isinstance(drafts, float):
                    seq.control.drafter = Oracle(expected.followed, drafts, step)
                    seq.control.drafter.extend(seq.output_ids)
                sequences[i] = seq
        for i, when in scenario["cancel"].items():
            if when == step and i in sequences:
                core.cancel(sequences[i])
        if core.scheduler.has_work:
            _, finished = core.step()
            core.scheduler.check()
            for seq in finished:
                core.drafts("").add("", seq.output_ids)
        step += 1
        assert step < 5000
    drain(core)
    core.close()
    for i, ((ask, page, params, _), _) in enumerate(requests):
        seq, expected = sequences[i], reference(world, ask, page, params)
        if seq.finish_reason != "cancelled":
            assert Outcome.of(core, seq) == expected
            if "stop" not in params:
                is_valid(core.text_of(seq), params["guidance"])
    return core, sequences


@settings(max_examples=50, deadline=None)
@given(scenarios())
def test_steered_output_does_not_depend_on_company_or_drafts(world, scenario):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pagemill.core, "LoopDetector", TouchyDetector)
        run(world, scenario)


def storm(seed):
    """Six long requests at once in a pool that holds little more than one."""
    pick = random.Random(seed)
    requests = []
    for i in range(6):
        params = dict(
            guidance=pick.choice(["off", "page", SCHEMA, REGEX]),
            guard=pick.choice(["off", "rescue"]),
            max_rescues=pick.randint(0, 9),
        )
        if pick.random() < 0.3:
            params.update(temperature=1.0, seed=pick.randint(0, 9))
        page = pick.choice([None, dict(num_glyphs=5000)])
        ask = Ask((pick.randint(0, 5), i, IMAGE, 3), (pick.randrange(len(IMAGES)),), pick.randint(16, 26))
        requests.append(((ask, page, params, pick.choice([1.0, 0.9, 0.5])), 0))
    engine = dict(num_blocks=pick.randint(21, 26), block_size=2, max_num_seqs=4)
    return dict(
        requests=requests,
        twin=True,
        cancel={},
        longest=pick.randint(1, 16),
        hopeful=True,
        seed=seed,
        engine=engine,
    )


def test_steered_output_survives_preemption(world, monkeypatch):
    monkeypatch.setattr(pagemill.core, "LoopDetector", TouchyDetector)
    preemptions = events = retries = accepted = 0
    for seed in range(5):
        core, sequences = run(world, storm(seed))
        preemptions += core.scheduler.num_preemptions
        events += sum(len(seq.control.events) for seq in sequences.values())
        retries += sum(len(seq.attempts) > 1 for seq in sequences.values())
        accepted += sum(seq.control.num_accepted for seq in sequences.values())
    assert preemptions > 10
    assert events > 10
    assert retries > 2
    assert accepted > 100


@pytest.mark.parametrize("guidance", ["page", SCHEMA, REGEX], ids=["page", "schema", "regex"])
def test_output_is_valid_wherever_the_cap_cuts_it(world, guidance):
    core = world.core(num_blocks=1000, max_num_seqs=16)
    sequences = [
        world.add(core, Ask((1, start), (), cap), guidance=guidance)
        for start in (0, 3)
        for cap in range(1, 50)
    ]
    drain(core)
    core.close()
    for seq in sequences:
        is_valid(core.text_of(seq), guidance)
        assert len(seq.output_ids) <= seq.params.max_new_tokens
        assert (seq.finish_reason == "stop") == (seq.token_ids[-1] in STOPS)


def test_a_retry_costs_output_tokens_only(world):
    core = world.core(prefix_sharing=False)
    computed, encoded, schedule = [], [], core.scheduler.schedule

    def counting(now=0.0):
        plan = schedule(now)
        computed.extend(work.num_tokens for work in plan.work)
        encoded.extend(plan.encode)
        return plan

    core.scheduler.schedule = counting
    page = PageTask(num_glyphs=5000)  # far more ink than any answer has text
    ask = Ask((1, 2, IMAGE, 3, 4), (0,), 60)
    seq = world.add(core, ask, page=page, guidance=SCHEMA, drafts="off", max_retries=2)
    drain(core)
    core.close()
    outputs = [attempt.token_ids for attempt in seq.attempts]
    assert len(outputs) == 3
    assert len(set(map(tuple, outputs))) == 3, "attempts differ"
    # Each attempt begins with the last token of the prompt, and does not compute the last one of the output.
    assert sum(computed) == (seq.num_prompt - 1) + sum(map(len, outputs))
    assert len(encoded) == 1
    assert seq.output_ids == outputs[seq.best]
    assert len(seq.output_ids) + seq.num_discarded == sum(map(len, outputs))


def test_a_retry_of_a_page_that_was_drawn_draws_something_else(world):
    core = world.core()
    page = PageTask(num_glyphs=5000)
    params = dict(guidance=SCHEMA, temperature=0.3, seed=0)  # what a retry of a greedy page takes
    seq = world.add(core, Ask((1, 2), (), 60), page=page, **params)
    drain(core)
    first, second = seq.attempts
    assert first.token_ids != second.token_ids


def failing(name, error, after):
    """A method that raises once it was called often enough."""

    def method(self, *arguments):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls > after:
            raise error
        return getattr(super(type(self), self), name)(*arguments)

    return method


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("part", ["guide.masks", "guide.accept", "guard.push", "drafter.extend"])
@pytest.mark.parametrize(
    "error", [RequestError("too complex here"), AssertionError("a bug")], ids=["limit", "bug"]
)
def test_what_fails_in_the_steering_costs_its_own_sequence_alone(world, part, error, after):
    core = world.core(max_num_seqs=4)
    core.draft_budget.lengths = lambda acceptances, limit, *_: [3 if a > 0 else 0 for a in acceptances]
    asks, params = [Ask((1, 2, i), (), 14) for i in range(4)], dict(guidance="page")
    sequences = [world.add(core, ask, **params) for ask in asks]
    holder, name = part.split(".")
    broken = sequences[1].control
    stub = getattr(broken, "_guard" if holder == "guard" else holder)
    stub.__class__ = type("Broken", (type(stub),), {name: failing(name, error, after)})
    drain(core)
    core.close()
    bad = sequences.pop(1)
    asks.pop(1)
    assert bad.finish_reason == "error"
    assert str(error) in bad.error
    for seq, ask in zip(sequences, asks, strict=True):
        assert seq.output_ids == reference(world, ask, None, params).token_ids


def test_broken_logits_cost_a_guided_page_alone(world):
    core = world.core()
    params = dict(guidance="page")
    good = Ask((1, 2, 3), (), 9)
    seq = world.add(core, good, **params)
    bad = [
        world.add(core, Ask((1, IMAGE, 2), (3,), 9), page=PageTask(), **params, **more)
        for more in ({}, dict(temperature=1.0, seed=0), dict(repetition_penalty=1.5))
    ]
    for one in bad:
        one.images[0].levels = np.full_like(one.images[0].levels, np.nan)
    drain(core)
    core.close()
    for one in bad:
        assert one.finish_reason == "error"
        assert "not finite" in one.error
    assert seq.output_ids == reference(world, good, None, params).token_ids


def test_a_run_is_rescued_after_a_prompt_of_one_token(world, monkeypatch):
    class AtFour(TouchyDetector):
        def push(self, token):
            self.ids.append(token)
            return Loop("run", 1, 1, 4, 4) if len(self.ids) == 4 else None

    monkeypatch.setattr(pagemill.core, "LoopDetector", AtFour)
    core = world.core()
    seq = world.add(core, Ask((1,), (), 9), max_rescues=1)
    plain = world.add(core, Ask((1,), (), 9), guard="off")
    drain(core)
    assert seq.error is None
    assert [event.action for event in seq.control.events] == ["ban", "end"]
    assert seq.finish_reason == "loop"
    assert seq.output_ids == plain.output_ids[:1], "what stood before the loop"


def test_what_was_rolled_back_is_never_found_as_something_else(world, monkeypatch):
    """The block at the cut is filled anew; another request with the old tokens must not get it."""

    class OnceAtNine(TouchyDetector):
        told = False

        def push(self, token):
            self.ids.append(token)
            if len(self.ids) != 9 or self.told:
                return None
            self.told = True
            return Loop("period", 2, 2, 3, 9)

    prompt = (1, 2, 3)
    old = reference(world, Ask(prompt, (), 9), None, dict(guard="off", ignore_eos=True)).token_ids
    monkeypatch.setattr(pagemill.core, "LoopDetector", OnceAtNine)
    for block_size in (1, 2, 3, 4, 6):
        core = world.core(block_size=block_size)
        seq = world.add(core, Ask(prompt, (), 20), drafts="off")
        drain(core)
        assert seq.output_ids[:2] == old[:2]
        assert seq.output_ids[2] != old[2]
        again = Ask((*prompt, *old), (), 6)
        other = world.add(core, again, guard="off", drafts="off")
        drain(core)
        assert other.output_ids == reference(world, again, None, dict(guard="off")).token_ids
        core.close()


def test_a_guide_ends_its_output_also_where_the_end_token_is_ignored(world):
    core = world.core()
    guided = world.add(core, Ask((1, 2), (), 60), guidance=SCHEMA, ignore_eos=True)
    free = world.add(core, Ask((1, 2), (), 60), ignore_eos=True)
    drain(core)
    assert guided.finish_reason == "stop"
    is_valid(core.text_of(guided), SCHEMA)
    assert len(free.output_ids) == 60


def test_a_stop_string_inside_what_the_grammar_forces_is_found(world):
    core = world.core()
    long = "".join(chr(0x41 + i * 7 % 26) for i in range(60))
    seq = world.add(core, Ask((1,), (), 99), guidance=Regex(f"[a-d]{long}[a-d]{{40}}"), stop=(long[:1],))
    drain(core)
    assert seq.finish_reason == "stop"
    assert re.fullmatch("[a-d]", core.text_of(seq))
