"""What people bring as a corpus is read, or the reason is told: odd rows, odd files, one document, shuffled Parquet."""

import bz2
import gzip
import json
import lzma
import os
import pickle
import re
import shutil
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxtok.cli import main
from jaxtok.data import files
from jaxtok.data.corpora import SPLITS, open_corpus
from jaxtok.data.text import TextData

TEXTS = [f"text {i}: " + "wörd 字 " * (i % 5) + "\n" for i in range(60)]
RECORDS = [{"n": i, "text": text} for i, text in enumerate(TEXTS)]

CONFIG = """
from jaxtok.data.text import TextData
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.transformer import TransformerConfig
from jaxtok.training.experiment import Experiment, TrainConfig

model = TransformerConfig(num_layers=1, d_model=16, num_heads=2, mlp_dim=32, vocab_size=0, max_length=32)
config = Experiment(
    task=LanguageModeling(model=model),
    data=TextData(corpus="x", length=32, batch_size=8),
    train=TrainConfig(steps=12, log_every=6, eval_every=6, checkpoint_every=12, tensorboard=False),
    name="x",
)
"""


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache folder of the test's own, and warnings that an earlier test has caused come again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files.tell.cache_clear()
    return tmp_path / "cache" / "jaxtok" / "corpora"


@pytest.fixture
def jaxtok(tmp_path, capsys, caplog):
    """Runs the command; returns its exit code and all that it says."""
    (tmp_path / "conf.py").write_text(CONFIG)

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        said = captured.out + captured.err + "\n".join(record.getMessage() for record in caplog.records)
        caplog.clear()
        return code, said

    return run


@pytest.fixture
def train_and_eval(jaxtok, tmp_path):
    def run(corpus):
        code, said = jaxtok("train", tmp_path / "conf.py", "--data.corpus", corpus, "--workdir", tmp_path / "run")
        return (code, said) if code else (jaxtok("eval", tmp_path / "run", "--corpus", corpus)[0], said)

    return run


def lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def texts(spec, split="all", **options):
    return [t.decode() if isinstance(t, bytes) else t for t in open_corpus(str(spec), split, **options)]


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# ------------------------------------------------------------------------------------------------------------- odd rows

BAD_ROWS = {
    "null": (b'{"text": null}', r"has no text in the field 'text' \(it is null\)"),
    "missing": (b'{"id": 3}', r"has no text in the field 'text' \(it has id\)"),
    "number": (b'{"text": 5}', r"has no text in the field 'text' \(its type is int\)"),
    "surrogate": (b'{"text": "a \\ud83d b"}', "has half of a pair of surrogates"),
    "torn": (b'{"text": "abc', "is not JSON"),
    "latin": (b'{"text": "caf\xe9"}', "is not JSON"),
    "no object": (b'["text"]', r"has no text in the field 'text' \(it is a list\)"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_row_without_a_text_is_left_out_and_told_once(tmp_path, caplog, kind):
    row, reason = BAD_ROWS[kind]
    good = lines(RECORDS).splitlines(keepends=True)
    path = write(tmp_path / "a.jsonl", b"".join([*good[:40], *[row + b"\n"] * 3, *good[40:]]))
    assert texts(path) == TEXTS
    corpus = open_corpus(str(path), "all")
    assert corpus[40] is None and list(corpus) == list(corpus) and corpus.without_text == {40, 41, 42}
    (message,) = [record.getMessage() for record in caplog.records]
    assert re.match(rf"row 40 of {re.escape(str(path))} {reason}.*; it is left out", message)
    path = write(tmp_path / "b.jsonl", b"".join([row + b"\n", *good]))  # as the first row
    assert texts(path) == TEXTS


def test_rows_without_a_text_are_counted(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", lines(RECORDS) + b'{"text": null}\n' * 150)
    for _ in range(2):
        assert texts(path) == TEXTS
    messages = [record.getMessage() for record in caplog.records]
    assert [re.match(r"row (\d+) ", message)[1] for message in messages] == ["60", "69", "159"]
    assert "the 10th that is left out" in messages[1] and "the 100th" in messages[2]


def test_a_run_goes_on_past_rows_without_a_text(tmp_path, train_and_eval):
    bad = b"".join(row + b"\n" for row, _ in BAD_ROWS.values())
    path = write(tmp_path / "a.jsonl", lines(RECORDS[:20]) + bad + lines(RECORDS[20:]))
    code, said = train_and_eval(path)
    assert code == 0 and len(re.findall(rf"row 2\d of {re.escape(str(path))} .* left out", said)) == 1


def test_training_resumes_exactly_among_rows_without_a_text(tmp_path):
    path = write(tmp_path / "a.jsonl", b"".join(lines([record]) + b'{"text": null}\n' for record in RECORDS))
    data = TextData(corpus=str(path), length=16, batch_size=2, shuffle_window=4)
    batches = data.train_batches()
    seen, states = [], []
    for _ in range(30):
        states.append(json.loads(json.dumps(batches.get_state())))
        seen.append(next(batches))
    for at in (3, 17):
        resumed = data.train_batches()
        resumed.set_state(states[at])
        for expected in seen[at : at + 8]:
            np.testing.assert_array_equal(next(resumed)["tokens"], expected["tokens"])


def test_a_split_without_any_text_is_an_error_and_no_endless_search(tmp_path):
    path = write(tmp_path / "a.jsonl", lines({"text": str(row)} for row in range(200)))
    keep = int(texts(path, "validation")[0])
    rows = [b'{"text": null}\n'] * 200
    rows[keep] = b'{"text": "in the validation split"}\n'
    path = write(tmp_path / "a.jsonl", b"".join(rows))
    with pytest.raises(ValueError, match=r"no text in all of \d+ rows: row \d+ of .*a\.jsonl has no text"):
        next(TextData(corpus=str(path), length=16, batch_size=2).train_batches())


def test_a_row_without_a_text_may_end_an_epoch_and_begin_the_next(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": null}\n{"text": "good"}\n')
    corpus = open_corpus(str(path), "all")
    assert [corpus[i] for i in [1, 0, 0, 1] * 5] == ["good", None, None, "good"] * 5
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "good"}\n' + b'{"text": null}\n' * 2)
    share = open_corpus(str(tmp_path / "b.jsonl"), "all")  # a stream whose share is the rows 1 and 2
    with pytest.raises(ValueError, match="no text in all of 2 rows"):
        [share[i] for i in [1, 2] * 3]


def test_a_tokenizer_is_trained_past_rows_without_a_text(tmp_path, jaxtok):
    path = write(tmp_path / "a.jsonl", lines(RECORDS * 4) + b'{"text": null}\n{"text": "\\ud800"}\n')
    code, said = jaxtok("tokenizer", tmp_path / "t.model", "--corpus", path, "--vocab-size", 280)
    assert code == 0 and "left out" in said, said


# ------------------------------------------------------------------------------------------------------------ odd files

PACK = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}
JSONS = {
    "a.jsonl": lines(RECORDS),
    "a.ndjson": lines(RECORDS),
    "a.json": lines(RECORDS),
    "a.JSONL": lines(RECORDS),
    "array.json": json.dumps(RECORDS).encode(),
    "pretty.json": json.dumps(RECORDS, indent=2).encode(),
    "objects.json": "\n".join(json.dumps(record, indent=1) for record in RECORDS).encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + lines(RECORDS).replace(b"\n", b"\r\n"),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(RECORDS).encode(),
    "utf16.jsonl": lines(RECORDS).decode().encode("utf-16"),
    "utf16.json": json.dumps(RECORDS, ensure_ascii=False).encode("utf-16"),
}


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", JSONS)
def test_rows_of_json_are_read_packed_or_not(tmp_path, name, suffix):
    path = write(tmp_path / "a" / f"{name}{suffix}", PACK[suffix](JSONS[name]))
    assert texts(path) == texts(path.parent) == TEXTS
    corpus = open_corpus(str(path))
    assert list(pickle.loads(pickle.dumps(corpus))) == [corpus[i] for i in range(len(corpus))]


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32"])
def test_text_is_read_packed_or_not(tmp_path, suffix, encoding):
    text = "".join(TEXTS) * 20
    path = write(tmp_path / "a" / f"t.txt{suffix}", PACK[suffix](text.encode(encoding)))
    assert "".join(texts(path)) == text and len(texts(path)) > 3
    assert [len(open_corpus(str(path), split)) > 0 for split in SPLITS] == [True] * 3
    write(tmp_path / "a" / "u.txt", b"another")
    assert texts(path.parent) == [text, "another"]


def test_packed_files_may_have_several_parts(tmp_path):
    """As `cat a.gz b.gz` makes them, and as the Pile and C4 have them."""
    for suffix in (".gz", ".bz2", ".xz", ".zst"):
        parts = [PACK[suffix](lines(part)) for part in (RECORDS[:30], RECORDS[30:])]
        assert texts(write(tmp_path / f"c4.json{suffix}", b"".join(parts))) == TEXTS


def test_a_json_file_that_holds_no_texts_is_a_document(tmp_path, caplog):
    package = write(tmp_path / "package.json", b'{"name": "x",\n "scripts": {"text": "a"}}')
    numbers = write(tmp_path / "numbers.json", b"[1, 2, 3]")
    other = write(tmp_path / "other.json", lines({"body": text} for text in TEXTS))
    assert sorted(texts(tmp_path)) == sorted(p.read_text() for p in (package, numbers, other))
    assert [record.getMessage() for record in caplog.records] == [
        "JSON lines are read as plain text, as they have no text in the field 'text' (set text_field to read their "
        f"rows), in other.json of {tmp_path}."
    ]
    assert set(TEXTS) < set(texts(tmp_path, text_field="body"))


@pytest.mark.parametrize("name", ["t.csv", "t.TSV", "t.csv.gz"])
def test_a_table_is_text_and_this_is_told(tmp_path, caplog, name):
    rows = "text,label\n" + "a text,1\n" * 40
    file = write(tmp_path / "in" / name, gzip.compress(rows.encode()) if name.endswith("gz") else rows.encode())
    for spec, place in ((file, f"{file}"), (file.parent, f"{name} of {file.parent}")):
        caplog.clear()
        assert "".join(texts(spec)) == rows
        (record,) = caplog.records
        assert record.getMessage() == (
            "CSV and TSV files are read as plain text, with all their columns (write one column as JSON lines to read "
            f"rows), in {place}."
        )


def test_what_is_left_out_of_a_folder_is_told_once(tmp_path, jaxtok, train_and_eval):
    root = tmp_path / "corpus"
    for i, text in enumerate(TEXTS):
        write(root / f"{i:02}.txt", text.encode())
    for i in range(7):
        write(root / "pictures" / f"{i}.png", b"\x89PNG\r\n\0")
    write(root / "no.jsonl.zst", b"\x28\xb5\x2f\xfd\x00\x58 no")
    (root / "gone.txt").symlink_to(tmp_path / "nothing")
    code, said = train_and_eval(root)
    assert code == 0
    named = "gone.txt, no.jsonl.zst, pictures/0.png, pictures/1.png, pictures/2.png and 4 more."
    assert said.count(f"9 files are left out of {root}, as no text can be read there: {named}") == 1


def test_folders_behind_links_are_read_once(tmp_path):
    root, other = tmp_path / "corpus", tmp_path / "other"
    for i, text in enumerate(TEXTS):
        write((root if i < 20 else other / "deep") / f"{i:02}.txt", text.encode())
    (root / "more").symlink_to(other)
    (root / "again").symlink_to(other / "deep")
    (root / "loop").symlink_to(root)
    (root / "up").symlink_to(tmp_path)
    assert sorted(texts(root)) == sorted(TEXTS)
    (tmp_path / "link").symlink_to(root)
    assert sorted(texts(tmp_path / "link")) == sorted(TEXTS)
    assert texts(write(tmp_path / "only" / "x", b"").parent.parent / "corpus" / "more") == TEXTS[20:]


@pytest.mark.parametrize("new", ["b.jsonl.gz", "b.json", "utf16.txt", "linked"])
def test_an_older_run_does_not_go_on_with_texts_that_it_did_not_read(tmp_path, new):
    root = tmp_path / "corpus"
    write(root / "a.jsonl", lines(RECORDS)), write(root / "a.txt", b"text"), write(root / "a.json", b'{"a": 1}')
    data = TextData(corpus=str(root), length=16, batch_size=2)
    batches = data.train_batches()
    next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    older = {stream: {name: x for name, x in at.items() if name != "reading"} for stream, at in state.items()}
    for saved in (state, older):  # it goes on while the corpus has nothing that is read in a new way
        batches.set_state(saved)
        next(batches)
    match new:
        case "b.jsonl.gz":
            write(root / new, gzip.compress(lines(RECORDS)))
        case "b.json":
            write(root / new, lines(RECORDS))
        case "utf16.txt":
            write(root / new, "text".encode("utf-16"))
        case "linked":
            write(tmp_path / "other" / "c.txt", b"text")
            (root / "linked").symlink_to(tmp_path / "other")
    with pytest.raises(ValueError, match=rf"1 of the files of .* left out or were plain text \({new}.*move them else"):
        data.train_batches().set_state(older)
    data.train_batches().set_state(state)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_packed_file_of_nothing_holds_no_documents(tmp_path, suffix):
    path = write(tmp_path / "a" / f"a.txt{suffix}", PACK[suffix](b""))
    with pytest.raises(ValueError, match="holds no documents"):
        open_corpus(str(path))
    with pytest.raises(ValueError, match=r"the validation split of .* is empty"):
        open_corpus(str(path.parent), "validation")


def test_a_file_that_is_damaged_further_on_is_an_error(tmp_path):
    data = bytes(np.random.default_rng(0).integers(32, 127, 200_000).astype(np.uint8))
    for suffix in (".gz", ".xz", ".zst"):
        path = write(tmp_path / f"a.txt{suffix}", PACK[suffix](data)[:-2000])
        with pytest.raises(ValueError, match=rf"a\.txt\{suffix} cannot be read to its end .*; replace or remove it"):
            open_corpus(str(path))
    path = write(tmp_path / "a.json", json.dumps(RECORDS)[:-30].encode())
    with pytest.raises(ValueError, match=r"a\.json cannot be read to its end"):
        open_corpus(str(path))


# --------------------------------------------------------------------------------------------------------- one document

LONG = "".join(f"word{i} " for i in range(4000)).strip()


def one_row(tmp_path, name):
    text = LONG[:9000]
    match name:
        case "row.jsonl":
            return write(tmp_path / name, lines([{"text": text}]))
        case "row.parquet":
            pq.write_table(pa.table({"text": [text]}), tmp_path / name)
            return tmp_path / name
    return write(tmp_path / "folder" / "a.txt", text.encode()).parent


ONE = {
    "text8": lambda path: write(path / "text8", LONG.encode()),
    "small.txt": lambda path: write(path / "small.txt", LONG[:400].encode()),
    "no spaces": lambda path: write(path / "a.txt", ("字" * 5000).encode()),
    "text8.gz": lambda path: write(path / "text8.gz", gzip.compress(LONG.encode())),
    **{name: lambda path, name=name: one_row(path, name) for name in ("row.jsonl", "row.parquet", "folder")},
}


@pytest.mark.parametrize("name", ONE)
def test_one_document_is_cut_so_that_something_is_held_out(tmp_path, caplog, name):
    path = ONE[name](tmp_path)
    (whole,) = texts(path)
    splits = {split: texts(path, split) for split in SPLITS}
    parts = [part for of_split in splits.values() for part in of_split]
    assert min(map(len, splits.values())) > 0 and len(splits["train"]) >= 0.8 * len(parts)
    assert sorted("".join(parts)) == sorted(whole) and all(part in whole for part in parts)
    if name != "no spaces":
        assert set(" ".join(parts).split()) == set(whole.split())  # cut between words
    assert len([r for r in caplog.records if f"is cut into {len(parts)} parts" in r.getMessage()]) == 1


@pytest.mark.parametrize("name", ["text8", "small.txt"])
def test_one_document_is_trained_on_and_evaluated(tmp_path, train_and_eval, name):
    code, said = train_and_eval(ONE[name](tmp_path))
    assert code == 0, said


def test_what_is_too_small_to_be_split_is_an_error(tmp_path, jaxtok):
    path = write(tmp_path / "tiny.txt", b"a few words")
    code, said = jaxtok("train", tmp_path / "conf.py", "--data.corpus", path, "--workdir", tmp_path / "run")
    assert code == 1 and "tiny.txt is empty, as it holds only 1 document; give more text" in " ".join(said.split())
    assert "holdout" not in said  # which is no option of the command


# ------------------------------------------------------------------------------------------------------------- Parquet


def write_parquet(path, rows, groups=64, **options):
    pq.write_table(pa.table({"id": list(range(len(rows))), "text": rows}), path, -(-len(rows) // groups), **options)
    return path


ARROW_TYPES = {
    "string": lambda rows: pa.array(rows),
    "large string": lambda rows: pa.array(rows, pa.large_string()),
    "dictionary": lambda rows: pa.array(rows).dictionary_encode(),
    "binary": lambda rows: pa.array([row and row.encode() for row in rows], pa.binary()),
    "string view": lambda rows: pa.array(rows, pa.string_view()),
}


@pytest.mark.parametrize("room", [True, False])
@pytest.mark.parametrize("kind", ARROW_TYPES)
def test_parquet_has_the_same_rows_with_and_without_a_copy(tmp_path, monkeypatch, caplog, cache, kind, room):
    rows = [*TEXTS, None, "", "ä"] * 3
    pq.write_table(pa.table({"text": ARROW_TYPES[kind](rows)}), tmp_path / "a.parquet", 50)
    if not room:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 0))
    assert texts(tmp_path / "a.parquet") == [row or "" for row in rows]
    order = np.random.default_rng(0).permutation(len(rows))
    corpus = open_corpus(str(tmp_path / "a.parquet"), "all")
    got = [corpus[int(i)] for i in order]
    assert [t.decode() if isinstance(t, bytes) else t for t in got] == [rows[i] or "" for i in order]
    assert len(list(cache.iterdir())) == room
    assert [("reading it in random order is slow" in r.getMessage()) for r in caplog.records] == [True] * (not room)


def test_parquet_is_copied_again_when_the_file_changes(tmp_path, cache):
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    for rows in (TEXTS, TEXTS[::-1], TEXTS):
        write_parquet(path, rows)
        os.utime(path, ns=(0, hash(tuple(rows)) % 10**15))
        assert texts(path) == rows
    assert len(list(cache.iterdir())) == 2


def test_parquet_that_is_not_unicode_and_columns_without_text(tmp_path):
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 2, pa.array([b"a\xff", b"b"]).buffers())})
    pq.write_table(table, tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == ["b"]
    pq.write_table(pa.table({"text": [["a"], ["b"]]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="no text in the field 'text'"):
        open_corpus(str(tmp_path / "b.parquet"))


def test_training_on_parquet_has_the_order_of_jsonl_and_resumes_exactly(tmp_path):
    """Both are the same function of the seed, whatever the row groups."""
    name = "a.x"  # the split is a hash of the name
    (tmp_path / "j").mkdir(), (tmp_path / "p").mkdir()
    write(tmp_path / "j" / f"{name}.jsonl", lines(RECORDS))
    write_parquet(tmp_path / "p" / f"{name}.parquet", TEXTS, groups=9)
    options = dict(length=16, batch_size=2, shuffle_window=4)
    corpora = [open_corpus(str(tmp_path / part), "all") for part in ("j", "p")]
    assert list(corpora[0]) == list(corpora[1])
    data = TextData(corpus=str(tmp_path / "p"), **options)
    batches = data.train_batches()
    seen = [next(batches) for _ in range(20)]
    state = json.loads(json.dumps(batches.get_state()))
    later = [next(batches)["tokens"] for _ in range(80)]  # into the second epoch
    resumed = data.train_batches()
    resumed.set_state(state)
    np.testing.assert_array_equal([next(resumed)["tokens"] for _ in range(80)], later)
    again = data.train_batches()
    np.testing.assert_array_equal([next(again)["tokens"] for _ in seen], [batch["tokens"] for batch in seen])
    other = TextData(corpus=str(tmp_path / "p"), seed=1, **options).train_batches()
    assert any((next(other)["tokens"] != batch["tokens"]).any() for batch in seen)


@pytest.mark.parametrize("many", ["row groups", "files"])
def test_shuffled_parquet_is_about_as_fast_as_jsonl_and_is_not_kept_in_memory(tmp_path, many):
    rows = [text * 40 for text in TEXTS * 100]
    root = tmp_path / "p"
    root.mkdir()
    if many == "files":
        for part in range(24):
            write_parquet(root / f"{part:02}.parquet", rows[part::24], groups=1)
    else:
        write_parquet(root / "a.parquet", rows, groups=64)
    path = write(tmp_path / "j" / "a.jsonl", lines({"text": text} for text in rows)).parent

    def seconds(corpus):
        order = np.random.default_rng(0).permutation(len(corpus))[:300]
        best = np.inf
        for _ in range(3):
            start = time.perf_counter()
            for i in order:
                corpus[int(i)]
            best = min(best, time.perf_counter() - start)
        return best

    corpora = [open_corpus(str(folder), "train") for folder in (root, path)]
    assert seconds(corpora[0]) < 3 * seconds(corpora[1])
    assert len(pickle.dumps(corpora[0])) < 40 * len(rows)  # numbers only, no texts


# ------------------------------------------------------------------------------------------- TensorFlow Datasets, LPIPS

RECIPE = ["train", "bae_16_imagenet256", "--task.model.image-size", "32", "--data.size", "32"]


@pytest.fixture
def tfds_folder(tmp_path, monkeypatch):
    from tensorflow_datasets.core import constants

    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


def test_imagenet_that_is_not_there_is_told_in_a_sentence(tmp_path, jaxtok, tfds_folder):
    code, said = jaxtok(*RECIPE, "--task.perceptual", "none", "--workdir", tmp_path / "run")
    said = " ".join(said.split())
    assert code == 1 and "TensorFlow Datasets cannot prepare 'imagenet2012'" in said
    assert "ILSVRC2012_img_train.tar" in said and str(tfds_folder) in said and "Traceback" not in said


def test_a_module_that_tfds_lacks_is_noticed_before_anything_is_fetched(tmp_path, jaxtok, tfds_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "importlib_resources", None)
    code, said = jaxtok(*RECIPE, "--task.perceptual", "none", "--workdir", tmp_path / "run")
    assert code == 1 and not tfds_folder.exists()
    assert "which is not installed; run `pip install importlib_resources`" in " ".join(said.split())


def test_missing_weights_of_lpips_are_noticed_before_the_images_are_opened(tmp_path, jaxtok, tfds_folder):
    code, said = jaxtok(*RECIPE, "--task.perceptual", tmp_path / "vgg.pth", "--workdir", tmp_path / "run")
    said = " ".join(said.split())
    assert code == 1 and not tfds_folder.exists() and "imagenet2012" not in said
    assert "LPIPS has no weights:" in said and "vgg.pth does not exist" in said and "mse, it needs none" in said
