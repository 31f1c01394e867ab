"""Guided output: whatever tokens are chosen and wherever it is cut, it ends as what was asked for."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pagemill.decode.guidance import MAX_GUIDANCE_CHARS, GuideFactory, PageFormat, Regex
from pagemill.errors import ConfigError, RequestError
from pagemill.model.loader import find_checkpoint

STOPS = frozenset({2034, 2036})
SPECIAL = set(range(2034, 2048))
VOCAB = 2100  # 52 ids of padding
TOKENIZER = Tokenizer.from_file(str(find_checkpoint("pagemill-tiny") / "tokenizer.json"))
PAGES = Path(__file__).parents[2] / "bench" / "pages"
STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


def factory(**page) -> GuideFactory:
    return GuideFactory(TOKENIZER, VOCAB, STOPS, PageFormat(**page))


FORMATS = {
    "any": PageFormat(),
    "fixed": PageFormat(order="fixed"),
    "all": PageFormat(optional=False),
    "all, fixed": PageFormat(order="fixed", optional=False),
    "text in the middle": PageFormat(("header", "text", "footer"), "fixed", True, ",", ":"),
    "no text": PageFormat(('a"b', "ação"), "any", True, ",\n", " : "),
}
FACTORIES = {name: GuideFactory(TOKENIZER, VOCAB, STOPS, page) for name, page in FORMATS.items()}
FACTORY = FACTORIES["any"]
BYTES = [FACTORY.tokenizer.decode_bytes([i]) for i in range(2034)]
# What random text would seldom hold: quotes, escapes, brackets, digits, and pieces of characters.
RARE = np.array(
    [bool(re.search(rb'["\\{}\[\]:,0-9]|u|null', b)) or b.decode(errors="ignore") == "" for b in BYTES]
)

SCHEMA = {
    "type": "object",
    "properties": {
        "number": {"type": "integer", "minimum": 12},
        "kind": {"enum": ["ofício", "nota fiscal", None]},
        "lines": {"type": "array", "items": {"$ref": "#/$defs/line"}, "minItems": 2, "maxItems": 3},
        "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]+$"},
    },
    "required": ["number", "lines", "code"],
    "additionalProperties": False,
    "$defs": {"line": {"type": "object", "properties": {"t": {"type": "string", "minLength": 3}},
                       "required": ["t"], "additionalProperties": False}},
}  # fmt: skip


def start(guidance="page", max_chars=None, maker=FACTORY):
    return maker.start(maker.compile(guidance, max_chars))


def begun(text, guidance="page", maker=FACTORY):
    guide = start(guidance, maker=maker)
    raw = text if isinstance(text, bytes) else text.encode()
    guide.accept(maker.tokenizer.tokenize_bytes(raw))
    return guide


def allowed(guide) -> np.ndarray:
    row = np.full((1, guide._factory.num_words), -1, np.int32)
    assert guide.masks([], row) == 1
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))


def walk(guide, seed, steps):
    """Accept random allowed tokens, unlikely ones often; return them."""
    rng = np.random.default_rng(seed)
    taken = []
    for _ in range(steps):
        tokens = allowed(guide)
        tokens = tokens[tokens < 2034]
        if not len(tokens):
            break
        rare = tokens[RARE[tokens]]
        token = int(rng.choice(rare if len(rare) and rng.random() < 0.6 else tokens))
        guide.accept([token])
        taken.append(token)
    return taken


def check_page(text, page: PageFormat, max_chars=None):
    text.encode()
    value = json.loads(text)
    keys = list(value)
    assert all(key in page.keys for key in keys)
    assert keys
    assert not page.optional or "text" not in page.keys or "text" in value
    assert page.optional or set(keys) == set(page.keys)
    assert page.order == "any" or keys == sorted(keys, key=page.keys.index)
    assert all(v is None or isinstance(v, str) for v in value.values())
    for v in value.values():
        (v or "").encode()  # no half of a surrogate pair
        assert max_chars is None or len(v or "") <= max_chars
    skeleton = page.item_separator.join(
        f"S{page.key_separator}{'N' if value[k] is None else 'S'}" for k in keys
    )
    assert STRING.sub("S", text).replace("null", "N") == "{" + skeleton + "}"


def check_schema(text):
    value = json.loads(text)
    assert set(value) <= {"number", "kind", "lines", "code"}
    assert isinstance(value["number"], int)
    assert value["number"] >= 12
    assert value.get("kind") in ("ofício", "nota fiscal", None)
    assert 2 <= len(value["lines"]) <= 3
    assert all(set(line) == {"t"} and len(line["t"]) >= 3 for line in value["lines"])
    assert re.fullmatch("[A-Z]{2}-[0-9]+", value["code"])


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(sorted(FORMATS)),
    st.integers(0, 2**32),
    st.integers(0, 40),
    st.sampled_from([None, None, 1, 5]),
)
def test_any_walk_over_the_masks_closes_to_a_page(name, seed, steps, max_chars):
    guide = start("page", max_chars, FACTORIES[name])
    tokens = walk(guide, seed, steps)
    assert guide.output == b"".join(BYTES[t] for t in tokens)
    closing = guide.closing()
    check_page(guide.text + closing, FORMATS[name], max_chars)
    if closing == "" and guide.ended:
        assert guide.text == guide.output.decode()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 60))
def test_any_walk_closes_to_the_schema(seed, steps):
    guide = start(SCHEMA)
    walk(guide, seed, steps)
    check_schema(guide.text + guide.closing())


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([r"[A-Z]{3}-[0-9]{4}", r"(é|ção|x+)*fim", r"a{20,30}|b{3}"]),
    st.integers(0, 2**32),
    st.integers(0, 20),
)
def test_any_walk_closes_to_the_regular_expression(pattern, seed, steps):
    guide = start(Regex(pattern))
    walk(guide, seed, steps)
    assert re.fullmatch(pattern, guide.text + guide.closing())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(0, 30), st.booleans())
def test_masks_along_a_draft_are_those_of_single_steps(seed, length, good, as_schema):
    guidance = SCHEMA if as_schema else "page"
    draft = walk(start(guidance), seed, length)
    guide, plain = start(guidance), start(guidance)
    good = min(good, len(draft))
    wrong = [2035] if good < len(draft) else []
    tried = draft[:good] + wrong + draft[good + 1 :]
    rows = np.zeros((1 + len(tried), guide._factory.num_words), np.int32)
    filled = guide.masks(tried, rows)
    assert filled == 1 + good
    for i in range(filled):
        row = np.zeros((1, rows.shape[1]), np.int32)
        plain.masks([], row)
        assert np.array_equal(row[0], rows[i])
        if i < good:
            plain.accept([draft[i]])
    assert guide.output == b""
    guide.accept(draft)  # unchanged by the draft


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(0, 40))
def test_rolling_back_is_as_never_having_gone_on(seed, steps, back):
    guide = start()
    tokens = walk(guide, seed, steps)
    if guide.ended:
        guide.accept([2036])
        tokens.append(2036)
    back = min(back, len(tokens))
    guide.rollback(back)
    kept = tokens[: len(tokens) - back]
    other = start()
    other.accept(kept)
    assert guide.output == other.output
    assert guide.ended == other.ended
    assert guide.forced() == other.forced()
    assert guide.end_string() == other.end_string()
    assert guide.closing() == other.closing()
    if kept[-1:] != [2036]:
        assert np.array_equal(allowed(guide), allowed(other))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.integers(0, 2**32), st.integers(0, 40))
def test_forced_tokens_are_all_that_the_mask_leaves(name, seed, steps):
    guide = start(maker=FACTORIES[name])
    walk(guide, seed, steps)
    forced = guide.forced()
    choice = allowed(guide)
    if guide.ended:
        assert forced == [2036]
        assert choice.tolist() == [2034, 2036]
        return
    text = b"".join(BYTES[t] for t in forced)
    for token in choice if forced else ():
        assert text.startswith(BYTES[token]) or BYTES[token].startswith(text)
    if len(choice) == 1:
        assert forced[:1] == choice.tolist()
    guide.accept(forced)


def test_forced_text_that_the_tokenizer_would_normalise_is_left_to_the_model():
    guide = start(Regex("cafe\u0301 com leite"))  # NFC makes one character of e and the accent
    assert guide.forced() == []
    assert BYTES[allowed(guide)[0]] in (b"c", b"ca", b"caf", b"cafe")


def test_a_tokenizer_that_truncates_and_pads_is_taken_without():
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding()
    maker = GuideFactory(tokenizer, VOCAB, STOPS, PageFormat(optional=False, order="fixed"))
    assert start(maker=maker).forced() == start(maker=FACTORIES["all, fixed"]).forced()


def test_what_the_model_wrote_is_accepted_and_its_keys_are_forced_as_it_writes_them():
    refused = []
    for line in (PAGES / "reference_hf_fp32.jsonl").read_text().splitlines():
        page = json.loads(line)
        for name in ("any", "fixed"):
            guide, forced, wrong = start(maker=FACTORIES[name]), 0, 0
            try:
                for i, token in enumerate(page["token_ids"]):
                    must = guide.forced()
                    forced += bool(must)
                    wrong += must != page["token_ids"][i : i + len(must)]
                    guide.accept([token])
            except AssertionError:
                refused.append(page["file"])
                wrong -= bool(guide.forced())
            assert forced > 8
            assert wrong <= 0
    # Two strings whose last quotation mark is escaped, two escapes that JSON does not have.
    invalid = ["legal_18.png", "hard_38.png", "hard_40.png", "hard_43.png"]
    assert refused == [name for name in invalid for _ in range(2)]


def test_only_stop_ids_of_all_special_and_padding_ids_and_only_at_the_end():
    guide = begun('{"text": "')
    tokens = allowed(guide)
    assert len(tokens) > 1900
    assert not set(tokens) & SPECIAL
    assert max(tokens) < 2034
    guide = begun('{"text": "a"}')
    assert guide.ended
    assert allowed(guide).tolist() == sorted(STOPS)
    optional = begun("aa", Regex("a*"))
    assert not optional.ended
    assert set(STOPS) < set(allowed(optional).tolist())
    optional.accept([2034])
    assert optional.ended
    assert optional.forced() == []
    assert optional.closing() == ""


@pytest.mark.parametrize(
    ("text", "closing"),
    [
        ("", '{"text": ""}'), ("{", '"text": ""}'), ('{"', 'text": ""}'), ('{"te', 'xt": ""}'), ('{"text"', ': ""}'),
        ('{"text": ', '""}'), ('{"text": n', "ull}"), ('{"text": "a', '"}'), ('{"text": null', "}"),
        ('{"text": "a"', "}"), ('{"header": "a', '", "text": ""}'), ('{"header": null, ', '"text": ""}'),
        ('{"text": "a"}', ""),
    ],
)  # fmt: skip
def test_the_shortest_closing(text, closing):
    assert begun(text).closing() == closing


@pytest.mark.parametrize(
    "inside",
    [b"a", b"", b"a\\", b"a\\u", b"a\\u00", b"\\ud83d", b"\\ud83d\\", b"\\ud83d\\ude", "aç".encode()[:-1],
     "€".encode()[:-1], "€".encode()[:-2], "😀".encode()[:-1], "😀".encode()[:-3], b"a, {\\\"", b"\\\\"],
)  # fmt: skip
def test_a_string_ends_properly_wherever_it_is_left(inside):
    for before in (b'{"header": "', b'{"margin": null, "text": "'):
        guide = begun(before + inside)
        ending = guide.end_string()
        assert ending
        check_page(guide.text + guide.closing(), FORMATS["any"])
        guide.accept(ending)
        assert guide.output.decode().endswith('"')
        assert guide.end_string() == []
        check_page(guide.output.decode() + guide.closing(), FORMATS["any"])


def test_no_string_ends_where_none_is_written():
    for text in (
        "",
        "{",
        '{"',
        '{"tex',
        '{"text"',
        '{"text": ',
        '{"text": nul',
        '{"text": "a"',
        '{"text": "a"}',
    ):
        assert begun(text).end_string() == []
    assert begun('"a', Regex('"[a-z]{1,5}"')).end_string() == []  # no JSON
    assert begun('["a", "b', {"type": "array", "items": {"type": "string"}}).end_string() != []
    assert begun('{"a": {"b', {"type": "object"}).end_string() == []  # a key
    assert begun('"A', {"type": "string", "pattern": "^A$"}).end_string() != []
    number = {"type": "object", "properties": {"a": {"type": "string", "minLength": 4}}, "required": ["a"]}
    assert FACTORY.tokenizer.decode_bytes(begun('{"a": "x', number).end_string()) == b'   "'


def test_strings_are_bounded():
    guide = start("page", 3)
    guide.accept(FACTORY.tokenizer.tokenize_str('{"text": "é\\n'))
    assert max(len(BYTES[t].decode(errors="ignore")) for t in allowed(guide)) <= 4  # a character, '"}'
    guide.accept(FACTORY.tokenizer.tokenize_str("😀"))
    assert all(BYTES[t].startswith(b'"') for t in allowed(guide))
    words = {
        "type": "array",
        "items": {"anyOf": [{"type": "string"}, {"type": ["string", "null"], "maxLength": 1}]},
    }
    guide = start(words, 2)
    guide.accept(FACTORY.tokenizer.tokenize_str('["ab'))
    assert {t for t in allowed(guide) if not BYTES[t].startswith(b'"')} == set()
    long = start("page", 20_000)
    long.accept(FACTORY.tokenizer.tokenize_str('{"text": "' + "á bê\\n" * 4_000))
    assert all(BYTES[t].startswith(b'"') for t in allowed(long))


def test_a_token_not_allowed_changes_nothing():
    guide = begun('{"text": "a')
    before = allowed(guide)
    ids = FACTORY.tokenizer.tokenize_str('b"}')
    for tokens in ([2035], [2036], [*ids, 5], [*ids, 2036, 2036], [ids[0], 2099]):
        with pytest.raises(AssertionError, match=r"token \d+ at \d of"):
            guide.accept(tokens)
        assert guide.output == b'{"text": "a'
        assert np.array_equal(allowed(guide), before)
    guide.accept([*ids, 2036])
    with pytest.raises(AssertionError):
        guide.accept([2036])
    with pytest.raises(AssertionError):
        guide.rollback(100)


def test_threads_share_a_factory():
    maker = factory()

    def one(seed):
        guidance = [SCHEMA, "page", Regex("(a|bc)*d"), {"type": "array", "items": {"type": "number"}}][
            seed % 4
        ]
        guide = start(guidance, None, maker)
        walk(guide, seed, 30)
        return guide.output, guide.closing(), allowed(guide).tolist()

    alone = [one(seed) for seed in range(24)]
    maker = factory()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(24))) == alone


def test_a_grammar_is_compiled_once_and_few_are_kept():
    maker = factory()
    assert maker.compile("page") is maker.compile("page")
    assert maker.compile("page") is not maker.compile("page", 10)
    assert maker.compile({"type": "object", "properties": {"b": {}, "a": {}}}) is not maker.compile(
        {"type": "object", "properties": {"a": {}, "b": {}}}
    )
    first = maker.compile("page")
    for i in range(1, 70):
        maker.compile(Regex("a" * i))
    assert maker.compile("page") is not first
    assert len(maker._cache) <= 64


@pytest.mark.parametrize(
    ("guidance", "said"),
    [
        ({"type": "strin"}, r"^JSON schema: Invalid type: strin$"),
        ({"type": "object", "properties": {"a/b": {"items": {"type": "strin"}}}}, r"at /properties/a~1b/items: Invalid type"),
        ({"$ref": "#/$defs/q", "$defs": {"q": {"anyOf": [{}, {"not": {}}]}}}, r"at /\$defs/q/anyOf/1: .*not"),
        ({"properties": {"a": {"type": "string", "pattern": "x(y"}}}, r"at /properties/a: unclosed group"),
        ({"properties": {"a": {"$ref": "#/$defs/none"}}}, r"at /properties/a: .*/\$defs/none"),
        ({"properties": {"a": {"$ref": "http://example.com/x"}}}, r"at /properties/a: .*example.com"),
        ({"type": "object", "properties": 5}, "properties must be an object"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength"),
        ({"a": {1, 2}}, "cannot be written as JSON"),
        ({"const": float("nan")}, "cannot be written as JSON"),
        (Regex("ab(c"), r"'ab\(c' at character 3: unclosed group"),
        (Regex("é[z-a]"), r"at character 3: invalid character class range"),
        (Regex("a(?=b)"), r"at character 2: look-around"),
        (Regex("[a&&b]"), "matches no output"),
        ("pages", "guidance should be 'page'"),
        (Regex("a" * (MAX_GUIDANCE_CHARS + 1)), "limit"),
        ({"enum": ["a" * MAX_GUIDANCE_CHARS]}, "limit"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_with_its_place(guidance, said):
    with pytest.raises(RequestError, match=said) as raised:
        FACTORY.compile(guidance)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


def test_hostile_guidance_is_refused_or_bounded():
    deep = {}
    for _ in range(2000):
        deep = {"items": deep}
    for guidance in (
        deep,
        Regex("(" * 3000 + "a" + ")" * 3000),
        {"type": "integer", "multipleOf": 982451653},
    ):
        with pytest.raises(RequestError):
            FACTORY.compile(guidance)
    guide = start(Regex("((((a{1,100}){1,100}){1,100}){1,100}){1,100}"))
    with pytest.raises(RequestError, match="too complex to follow"):
        walk(guide, 0, 300)
    assert start({"type": "string", "minLength": 10**6}).closing() is None


def test_unusable_settings_are_refused():
    for bad in (
        dict(keys=()),
        dict(keys=("a", "a")),
        dict(order="other"),
        dict(item_separator=";"),
        dict(key_separator=","),
    ):
        with pytest.raises(ConfigError):
            PageFormat(**bad)
    with pytest.raises(ConfigError, match="token 2047"):
        GuideFactory(TOKENIZER, 2040, STOPS, PageFormat())
    with pytest.raises(ConfigError, match="stop ids"):
        GuideFactory(TOKENIZER, VOCAB, frozenset(), PageFormat())
    with pytest.raises(RequestError):
        FACTORY.compile("page", 0)
    with pytest.raises(ValueError, match="int32"):
        start().masks([], np.zeros((1, 3), np.int32))
