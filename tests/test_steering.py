"""Steering on the real engine core: drafts, guidance, rescue and retries give the same in any company, and cost what they should.

The reference of every request is itself alone, without drafts, with room to spare. Oracles, which know the reference's tokens,
and liars make the drafts; a detector that calls three equal tails a loop makes a random model need rescue often.
"""

import json
import math
import random
import re
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from micro import IMAGE, Ask, asks, drain

import pagemill.core
from pagemill.decode.guidance import Regex
from pagemill.decode.loops import Loop
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
    """Calls it a loop when the output ends with three equal parts of up to three tokens."""

    def __init__(self, pieces, expected_tokens=None):
        self.ids = []

    def push(self, token):
        self.ids.append(token)
        n = len(self.ids)
        for period, kind in ((1, "run"), (2, "period"), (3, "counter")):
            body = self.ids[n - period :]
            if n >= 3 * period and self.ids[n - 3 * period :] == 3 * body:
                return Loop(kind, n - 2 * period, period, 3, n)
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
        attempts = [(a.token_ids, a.closing, a.verdict.confidence, a.verdict.loops) for a in seq.attempts]
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
        core = world.core(prefix_sharing=False, num_blocks=400)
        seq = world.add(core, ask, page=page and PageTask(**page), **{**params, "drafts": "off"})
        followed = remember(seq)
        drain(core)
        core.close()
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
    ask = draw(asks())
    ask = Ask(ask.prompt, ask.images, draw(st.sampled_from([1, 2, 3, 5, 9, 14, 20, 26])))
    params = dict(
        guidance=draw(st.sampled_from(["off", "page", SCHEMA, REGEX])),
        guard=draw(st.sampled_from(["rescue", "rescue", "stop", "off"])),
        max_rescues=draw(st.integers(0, 3)),
    )
    if draw(st.integers(0, 3)) == 0:
        params.update(temperature=draw(st.sampled_from([0.3, 1.5])), seed=draw(st.integers(0, 3)))
        if draw(st.booleans()):
            params.update(top_p=0.8, repetition_penalty=1.2)
    page = None
    if draw(st.booleans()):
        page = dict(num_glyphs=draw(st.sampled_from([None, 0, 5000])))
        params.update(max_retries=draw(st.integers(0, 2)))
    drafts = draw(st.sampled_from(["off", "own", "text", 1.0, 0.8, 0.3]))
    return ask, page, params, drafts


@st.composite
def scenarios(draw):
    block_size = draw(st.sampled_from([1, 3, 4, 16]))
    return dict(
        requests=draw(st.lists(st.tuples(steered(), st.integers(0, 9)), min_size=1, max_size=5)),
        twin=draw(st.booleans()),
        cancel=draw(st.dictionaries(st.integers(0, 4), st.integers(0, 30), max_size=2)),
        longest=draw(st.sampled_from([1, 2, 7, 16])),
        seed=draw(st.integers(0, 99)),
        engine=dict(
            block_size=block_size,
            num_blocks=draw(st.integers(-(-60 // block_size), -(-100 // block_size))),
            max_num_seqs=draw(st.integers(1, 4)),
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
    core.draft_budget.lengths = lambda acceptances, limit, others: [
        lengths.randint(0, min(limit, scenario["longest"])) if a > 0 else 0 for a in acceptances
    ]
    sequences, step = {}, 0
    while step <= 9 or core.scheduler.has_work:
        for i, ((ask, page, params, drafts), arrival) in enumerate(requests):
            if arrival == step:
                expected = reference(world, ask, page, params)
                task = page and PageTask(**page)
                if drafts == "text":
                    task = task or PageTask()
                    task.texts = [[1, 2, 3], expected.token_ids[:-1]]
                seq = world.add(core, ask, page=task if page else None, drafts="auto", **params)
                if drafts == "off":
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
                core.drafts.add("", seq.output_ids)
        step += 1
        assert step < 5000
    drain(core)
    core.close()
    for i, ((ask, page, params, _), _) in enumerate(requests):
        seq, expected = sequences[i], reference(world, ask, page, params)
        if seq.finish_reason != "cancelled":
            assert Outcome.of(core, seq) == expected
            is_valid(core.text_of(seq), params["guidance"])
    return core, sequences


@pytest.fixture
def touchy(monkeypatch):
    monkeypatch.setattr(pagemill.core, "LoopDetector", TouchyDetector)


@settings(max_examples=150, deadline=None)
@given(scenarios())
def test_steered_output_does_not_depend_on_company_or_drafts(world, scenario):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pagemill.core, "LoopDetector", TouchyDetector)
        run(world, scenario)
