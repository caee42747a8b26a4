"""Noise makes as many errors as it should, where it should, and the same ones in every run."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtok.data.noise import EDITS, KINDS, Noise, noisy, other_letter
from jaxtok.data.text import TextData
from jaxtok.data.words import WordText

TEXT = "The quick brown fox, 12 jumps over Größe и Привет 東京; " * 40


@pytest.mark.parametrize("kind", EDITS)
@pytest.mark.parametrize("of", ["letters", "words"])
def test_the_share_with_errors(kind, of):
    noise = Noise(kind, 0.2, of)
    text = noise(TEXT).decode()
    assert text == noise(TEXT.encode()).decode() and text != Noise(kind, 0.2, of, seed=1)(TEXT).decode()
    old, new = TEXT.split(), text.split()
    assert len(old) == len(new)  # no word is lost
    if of == "words":
        assert 0.1 < np.mean([a != b for a, b in zip(old, new)]) < 0.3
    letters = sum(c.isalpha() for c in TEXT)
    hits = letters if of == "letters" else len(old)
    difference = {"drop": -1, "insert": 1}.get(kind, 0) * 0.2 * hits
    assert len(text) - len(TEXT) == pytest.approx(difference, abs=0.05 * hits)
    if kind == "swap":
        assert all(sorted(a) == sorted(b) for a, b in zip(old, new))
    if kind == "substitute":
        assert np.mean([a != b for a, b in zip(TEXT, text)]) == pytest.approx(0.2 * hits / len(TEXT), rel=0.3)


def test_capitals_and_no_noise():
    assert Noise("upper")("abc é\n").decode() == "ABC É\n"
    for kind in EDITS:
        assert Noise(kind, 0.0)(TEXT) == TEXT.encode()
        assert Noise(kind, 0.0, "words")(TEXT) == TEXT.encode()


@given(st.binary(max_size=30), st.sampled_from(KINDS), st.sampled_from(["letters", "words"]))
def test_any_bytes(data, kind, of):
    out = Noise(kind, 1.0, of)(data)
    if kind != "upper":
        words = data.decode(errors="surrogateescape").split()
        assert len(out.decode(errors="surrogateescape").split()) == len(words)


@given(st.characters(categories=["L"]))
def test_other_letters_are_of_the_same_script_and_case(letter):
    other = other_letter(letter, np.random.default_rng(0))
    assert other != letter
    if unicodedata.name(letter, "").startswith(("GREEK", "CYRILLIC", "HIRAGANA", "LATIN")):
        assert unicodedata.name(other).split()[0] == unicodedata.name(letter).split()[0]
    if unicodedata.category(letter) in ("Lu", "Ll") and not other.isascii():
        assert unicodedata.category(other) == unicodedata.category(letter)


def test_data_of_documents_with_errors(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    for data in (TextData(corpus=str(tmp_path / "text.txt")), WordText(corpus=str(tmp_path / "text.txt"))):
        noise = Noise("drop", 0.3)
        clean, wrong = (list(d.eval_batches("all")) for d in (data, noisy(data, noise)))
        assert sum(b["bytes"].sum() for b in clean) == len(TEXT.encode())
        assert sum(b["bytes"].sum() for b in wrong) == len(noise(TEXT))
        assert isinstance(noisy(data, noise), type(data))


def test_what_cannot_be():
    for options, message in [
        ({"kind": "typo"}, "kind is 'typo'"),
        ({"rate": 1.5}, "rate is 1.5"),
        ({"of": "bytes"}, "of is 'bytes'"),
        ({"seed": -1}, "seed is -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            Noise(**options)
    assert Noise("swap").name == "swap_0.1" and Noise("any", 0.2, "words").name == "any_0.2_of_words"
    assert Noise("upper").name == "upper"
