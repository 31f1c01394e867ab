"""What steers a sequence: which tokens are banned after a rescue, which never are, and that every part goes back together."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagemill.decode.control import Control
from pagemill.decode.loops import Loop
from pagemill.decode.sampler import SamplingParams

VOCAB = 64
WORDS = VOCAB // 32


class FakeGuide:
    """Allows any token, or only `allowed`; ends a string by 60, 61 where it is `in_string`."""

    def __init__(self, allowed=None, in_string=True):
        self.allowed, self.in_string = allowed, in_string
        self.tokens = []

    def masks(self, draft, out):
        out[:] = -1
        if self.allowed is not None:
            out[:] = 0
            for token in self.allowed:
                out.view(np.uint32)[:, token // 32] |= np.uint32(1 << token % 32)
        return len(out)

    def accept(self, token_ids):
        self.tokens += token_ids

    def rollback(self, num_tokens):
        assert num_tokens <= len(self.tokens)
        del self.tokens[len(self.tokens) - num_tokens :]

    def end_string(self):
        return [60, 61] if self.in_string else []


class FakeGuard:
    """Finds the loops that it is told to, by the number of tokens."""

    def __init__(self, loops=()):
        self.loops = {loop.end: loop for loop in loops}
        self.tokens = []

    def push(self, token):
        self.tokens.append(token)
        return self.loops.get(len(self.tokens))

    def rollback(self, num_tokens):
        assert num_tokens <= len(self.tokens)
        del self.tokens[num_tokens:]


class FakeDrafter:
    def __init__(self):
        self.tokens = []

    def extend(self, token_ids):
        self.tokens += token_ids

    def rollback(self, num_tokens):
        del self.tokens[num_tokens:]


def loop_of(before, body, repeats=4, kind="period"):
    """Return an output that ends in a loop, and the loop."""
    output = [*before, *body * repeats]
    start = len(before) + len(body)
    return output, Loop(kind, start, len(body), repeats, len(output))


def rescued(before, body, *, guide=None, kind="period", **params):
    """Return a control that has rescued such a loop once, and what is left of the output."""
    output, loop = loop_of(before, body, kind=kind)
    control = Control(SamplingParams(**params), guide=guide, guard=FakeGuard([loop]))
    assert control.extend(output) == loop
    assert control.rescue(loop, output) == []
    return control, output[: loop.start]


def allowed(control, history, draft=()):
    """Return the set of tokens that may come after `history` and each draft token."""
    rows = np.zeros((1 + len(draft), WORDS), np.int32)
    control.fill_masks(history, list(draft), rows)
    return [{t for t in range(VOCAB) if row[t // 32] >> (t % 32) & 1} for row in rows]


EVERY = set(range(VOCAB))


def test_without_guide_or_loop_nothing_is_restricted():
    control = Control(SamplingParams())
    assert not control.masked
    assert allowed(control, [1, 2, 3], [4, 5]) == [EVERY] * 3


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(0, 39), st.booleans())
def test_a_loop_is_left_in_whatever_phase_it_is_entered(body, phase, drafted):
    """By the definition: where the last tokens are those of the repeated body, the next one of it may not come."""
    control, kept = rescued([50, 51], body)
    history = [*kept, 52, *body * 30]
    control.extend(history[len(kept) :])
    window = min(max(len(body), 4), 24)
    at = len(history) - len(body) * 4 + phase % len(body)
    before, nexts = history[:at], history[at]
    rows = allowed(control, before[:-2], before[-2:]) if drafted else allowed(control, before)
    ends_alike = {
        body[(i + window) % len(body)]
        for i in range(len(body))
        if [body[(i + k) % len(body)] for k in range(window)] == before[-window:]
    }
    assert nexts in ends_alike
    assert rows[-1] == EVERY - ends_alike


def test_the_start_of_the_repetition_is_barred_there_alone():
    control, kept = rescued([50], [1, 2, 3, 4, 5])
    assert allowed(control, kept) == [EVERY - {1}]
    control.extend([9])
    assert allowed(control, [*kept, 9]) == [EVERY]


def test_short_bodies_may_stand_a_few_times():
    """The zeros of an amount: only the fifth in a row is refused."""
    control, kept = rescued([50], [7])
    control.extend([9])
    history = [*kept, 9]
    rows = allowed(control, history, [7, 7, 7, 7])
    assert rows == [EVERY] * 4 + [EVERY - {7}]


def test_numbers_that_count_are_barred_once_but_not_banned():
    """What is repeated of a counting body is not the same tokens."""
    control, kept = rescued([50], [1, 2, 3, 4], kind="counter")
    assert allowed(control, kept) == [EVERY - {1}]
    control.extend([9, 1, 2, 3, 4, 1, 2, 3, 4])
    assert allowed(control, [*kept, 9, 1, 2, 3, 4, 1, 2, 3, 4]) == [EVERY]


def test_the_only_way_of_the_grammar_stays_open():
    guide = FakeGuide(allowed={1})
    control, kept = rescued([50], [1, 2, 3, 4], guide=guide)
    assert allowed(control, kept) == [{1}]
    guide.allowed = {1, 8}
    assert allowed(control, kept) == [{8}]


def test_first_a_ban_then_the_string_is_closed_then_the_end():
    body = [1, 2, 3, 4]
    guide, guard, drafter = FakeGuide(), FakeGuard(), FakeDrafter()
    control = Control(SamplingParams(max_rescues=2), guide=guide, guard=guard, drafter=drafter)
    history = []
    for tokens in ([], [60, 61], None):
        output, loop = loop_of([*history, 50], body)
        guard.loops = {loop.end: loop}
        assert control.extend(output[len(history) :]) == loop
        assert control.rescue(loop, output) == tokens
        history = output[: loop.start]
        assert guide.tokens == guard.tokens == drafter.tokens == history
    assert [event.action for event in control.events] == ["ban", "close", "end"]
    assert [event.tokens for event in control.events] == [12, 12, 12]


@pytest.mark.parametrize("guide", [None, FakeGuide(in_string=False)])
def test_where_no_string_can_be_closed_the_next_loop_is_banned_too(guide):
    control, history = rescued([50], [1, 2, 3, 4], guide=guide)
    output, loop = loop_of([*history, 50], [5, 6, 7, 8])
    control.extend(output[len(history) :])
    assert control.rescue(loop, output) == []
    assert [event.action for event in control.events] == ["ban", "ban"]
    kept = output[: loop.start]
    control.extend([9, 1, 2, 3, 4])
    assert allowed(control, [*kept, 9, 1, 2, 3, 4]) == [EVERY - {1}], "the first ban holds on"
    control.extend([9, 5, 6, 7, 8])
    assert allowed(control, [*kept, 9, 1, 2, 3, 4, 9, 5, 6, 7, 8]) == [EVERY - {5}]


@pytest.mark.parametrize("params", [dict(guard="stop"), dict(max_rescues=0)])
def test_a_loop_that_may_not_be_rescued_ends_the_output(params):
    output, loop = loop_of([50], [1, 2, 3])
    control = Control(SamplingParams(**params), guard=FakeGuard([loop]))
    control.extend(output)
    assert control.rescue(loop, output) is None
    assert not control.masked


def test_of_two_loops_in_one_step_the_first_counts():
    """A draft may run on beyond a loop: what follows is thrown away."""
    output, loop = loop_of([50], [1, 2, 3])
    later = Loop("period", 6, 3, 3, len(output) + 1)
    control = Control(SamplingParams(), guard=FakeGuard([loop, later]))
    assert control.extend([*output, 1, 2]) == loop


def test_a_restart_forgets_the_bans_and_keeps_the_record():
    guide = FakeGuide()
    control, _ = rescued([50], [1, 2, 3, 4], guide=guide, max_rescues=1)
    control.restart(SamplingParams(temperature=0.5, seed=3, max_rescues=1))
    assert guide.tokens == []
    assert allowed(control, [1, 2, 3, 4]) == [EVERY]
    assert len(control.events) == 1
    assert control.sampling.random is not None
    output, loop = loop_of([50], [5, 6])
    control.extend(output)
    assert control.rescue(loop, output) == [], "rescues are counted anew"
