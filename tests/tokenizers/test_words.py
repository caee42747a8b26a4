"""Words equal those of the authors' splitter, and joined they are the text again, whatever bytes it has."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtok.tokenizers import words
from jaxtok.tokenizers.words import RULES, WordSplitter, limited, split_specials, unicode_rule

SPECIALS = {"<|eot_id|>": 192, "<|begin_of_text|>": 193}
ODD = "aAbZz09 .,'\"_-!()\t\n\r  $+=^~|\x00\x1c\x1f\x0b\x85éßÉ東京ひカ한👍🏽🇩🇪٣\u3000\u00a0\u200b\u00ad"
texts = st.text(st.sampled_from(ODD), max_size=24)
all_texts = st.one_of(texts, st.text(max_size=20))
broken = st.lists(st.sampled_from([97, 32, 10, 0xE3, 0x80, 0x81, 0xC2, 0x85, 0xFF, 0xE9, 0xF0, 0x9F]), max_size=14)
any_bytes = st.one_of(st.binary(max_size=24), broken.map(bytes), all_texts.map(str.encode))


@pytest.fixture(params=["wheel", "pure"])
def implementation(request, monkeypatch):
    """The unicode rule with the authors' wheel, and without it."""
    if request.param == "pure":
        monkeypatch.setattr(words, "_Wheel", None)
    elif words._Wheel is None:
        pytest.skip("hat-splitter is not installed")
    words._line.cache_clear()
    words._opens.cache_clear()
    yield
    words._line.cache_clear()
    words._opens.cache_clear()


@pytest.mark.parametrize("name", ["splitter", "splitter_edges"])
def test_the_words_of_the_authors(name, request, implementation):
    cases = json.loads((request.config.getoption("--goldens") / "hat" / f"{name}.json").read_text())
    whole = WordSplitter("unicode", 10**6)
    for case in cases["split"]:
        assert [word.decode() for word in whole.split(case["text"])] == case["words"]
    for case in cases.get("split_with_limit", []):
        split = WordSplitter("unicode", case["limit"]).split(case["text"])
        assert [len(word) for word in split] == case["word_lens"], case
    for case in cases["streaming"]:
        data = case["text"].encode()
        assert [len(word) for word in WordSplitter("unicode").stream(data)] == case["incremental_word_lens"], case
        assert [len(word) for word in WordSplitter("unicode").split(data)] == case["full_word_lens"], case
    for case in cases.get("streaming_bytes", []):
        found = WordSplitter("unicode", case["limit"]).stream(bytes(case["bytes"]))
        assert [len(word) for word in found] == case["word_lens"], case
    for case in cases.get("encode_special", []):
        assert [list(word) for word in split_specials(WordSplitter("unicode"), case["text"], SPECIALS)] == case["ids"]


@given(any_bytes, st.sampled_from(RULES), st.sampled_from([1, 3, 4, 100]))
@settings(deadline=None)
def test_words_are_the_bytes_again(data, rule, limit):
    splitter = WordSplitter(rule, limit)
    for found in (splitter.split(data), splitter.stream(data)):
        assert b"".join(found) == data
        assert all(1 <= len(word) <= limit for word in found)


@given(texts)
@settings(deadline=None)
def test_streamed_words_are_those_of_the_text(text):
    """Except where a mark or modifier follows whitespace or punctuation, as in the authors' rule."""
    text = text.replace("🏽", "").replace("\u200b", "").replace("\u00ad", "")
    splitter = WordSplitter("unicode", 10**6)
    assert splitter.stream(text.encode()) == splitter.split(text)


@given(any_bytes)
def test_streamed_words_are_those_of_any_bytes_by_whitespace(data):
    splitter = WordSplitter("whitespace", 10**6)
    data += b"x"  # which ends a character that was not finished
    assert splitter.stream(data) == splitter.split(data)


@given(st.one_of(texts, st.text(st.characters(max_codepoint=127), max_size=30)))
@settings(deadline=None)
def test_the_short_cut_for_ascii_is_the_definition(text):
    assert list(unicode_rule(text)) == list(words._by_definition(text))


@given(all_texts)
def test_a_text_and_its_bytes_have_the_same_words(text):
    for rule in RULES:
        assert WordSplitter(rule).split(text) == WordSplitter(rule).split(text.encode())


def test_whitespace_is_that_of_unicode():
    """U+001C to U+001F are not whitespace, though `str.isspace` says so; U+0085 and U+3000 are."""
    assert WordSplitter().split("a\x1cb \x1fc\x85d\u3000 e") == [
        b"a\x1cb ",
        b"\x1fc\xc2\x85",
        b"d\xe3\x80\x80 ",
        b"e",
    ]
    assert WordSplitter().split(" \n a") == [b" \n ", b"a"]


def test_three_cases_where_the_stream_differs():
    splitter = WordSplitter("unicode")
    for text, full, streamed in [
        ("1⁄2", 1, 3),
        ("_\u0301a", 2, 3),
        (" \t\u0301", 1, 2),
        ("a" * 99 + "éb", 2, 3),
    ]:
        assert (len(splitter.split(text)), len(splitter.stream(text.encode()))) == (full, streamed), text


def test_long_words_are_cut_between_characters():
    assert list(limited("aéé".encode(), 4)) == ["aé".encode(), "é".encode()]
    assert list(limited("東京".encode(), 2)) == [b"\xe6\x9d", b"\xb1", b"\xe4\xba", b"\xac"]


def test_the_string_of_a_special_token_is_text_unless_asked():
    splitter = WordSplitter("unicode")
    assert 192 not in b"".join(splitter.split("a<|eot_id|>"))
    assert split_specials(splitter, "a<|eot_id|>", SPECIALS)[-1] == b"\xc0"
    assert split_specials(splitter, "a<|eot_id|>", {}) == splitter.split("a<|eot_id|>")
    with pytest.raises(ValueError, match="special token 'x' is byte 97"):
        split_specials(splitter, "x", {"x": 97})


def test_what_cannot_be():
    with pytest.raises(ValueError, match="max_word_size is 0; it must be at least 1"):
        WordSplitter(max_word_size=0)
    with pytest.raises(ValueError, match="rule is 'bpe'"):
        WordSplitter("bpe")
    assert WordSplitter().split("") == WordSplitter("unicode").split(b"") == []
    assert WordSplitter("unicode").split("a\udc80") == [b"a", b"\x80"]
    with pytest.raises(UnicodeEncodeError):
        WordSplitter("unicode").split("a\ud800")
