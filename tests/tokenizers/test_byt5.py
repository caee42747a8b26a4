"""ByT5's ids, and the strings that Hugging Face reads as special tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtok.tokenizers import ByT5Tokenizer

PIECES = [
    "<pad>",
    "</s>",
    "<unk>",
    "<extra_id_0>",
    "<extra_id_124>",
    "<extra_id_125>",
    "<extra_id_01>",
    " ",
    "\n",
    "é",
    "x",
]


def test_ids():
    tokenizer = ByT5Tokenizer()
    assert tokenizer.vocab_size == 384 and tokenizer.eod_id == 1
    assert tokenizer.encode("hi") == [107, 108] and tokenizer.encode_text("hi") == [107, 108, 1]
    assert tokenizer.encode(b"\x00\xff") == [3, 258] and tokenizer.decode([3, 258]) == b"\x00\xff"
    assert tokenizer.decode([0, 1, 2, 259, 383]) == b""
    with pytest.raises(ValueError, match="special is 'x'"):
        ByT5Tokenizer("x")


def test_special_strings():
    plain, special = ByT5Tokenizer(), ByT5Tokenizer("ids")
    assert special.encode("a <extra_id_3> b </s>  <pad>c") == [100, 35, 262, 35, 101, 1, 0, 102]
    assert plain.decode(plain.encode("a </s>")) == b"a </s>" and len(plain.encode("</s>")) == 4
    assert special.encode_text("a</s>") == [100, 1] and special.decode([262]) == b"<extra_id_3>"


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=8).map("".join))
def test_as_hugging_face_reads_them(text):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.ByT5Tokenizer()
    assert ByT5Tokenizer("ids").encode(text) == theirs(text, add_special_tokens=False).input_ids
