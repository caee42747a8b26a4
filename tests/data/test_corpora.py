"""Every kind of corpus gives its documents by number, each in one split, the same split everywhere."""

import itertools
import json
import pickle
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from jaxtok.data.corpora import SPLITS, open_corpus

DOCUMENTS = [f"document {i}\n" + "word " * (i % 7) for i in range(300)]


def write_jsonl(path, documents=DOCUMENTS, field="text"):
    path.write_text("\n\n".join(json.dumps({field: text, "n": 1}, ensure_ascii=False) for text in documents))


def write_parquet(path, documents=DOCUMENTS, field="text"):
    pq.write_table(pa.table({"n": list(range(len(documents))), field: documents}), path, row_group_size=7)


def write_array_record(path, documents=DOCUMENTS):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for text in documents:
        writer.write(text.encode())
    writer.close()


def write_files(path, documents=DOCUMENTS):
    for i, text in enumerate(documents):
        file = path / f"folder{i % 3}" / f"{i:03}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


class TinyTexts(tfds.core.GeneratorBasedBuilder):
    """A data set that has splits for training and test, and none for validation."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(DOCUMENTS[:280]), "test": self._generate_examples(DOCUMENTS[280:])}

    def _generate_examples(self, documents):
        for i, text in enumerate(documents):
            yield i, {"text": text}


@pytest.fixture(scope="session")
def specs(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpora")
    write_files(root / "files")
    write_jsonl(root / "a.jsonl")
    write_parquet(root / "a.parquet")
    write_array_record(root / "a.arrayrecord")
    (root / "mixed").mkdir()
    write_jsonl(root / "mixed" / "a.jsonl", DOCUMENTS[:100])
    write_parquet(root / "mixed" / "b.parquet", DOCUMENTS[100:200])
    write_files(root / "mixed" / "c", DOCUMENTS[200:])
    (root / "records").mkdir()
    write_array_record(root / "records" / "a-0", DOCUMENTS[:150])
    write_array_record(root / "records" / "a-1", DOCUMENTS[150:])
    tfds.core.add_data_dir(root / "tfds")
    TinyTexts(data_dir=root / "tfds", file_format="array_record").download_and_prepare()
    names = {"files": "files", "jsonl": "a.jsonl", "parquet": "a.parquet", "mixed": "mixed"}
    return {kind: str(root / name) for kind, name in names.items()} | {
        "arrayrecord": f"arrayrecord:{root}/a.arrayrecord",
        "arrayrecord_folder": f"arrayrecord:{root}/records",
        "arrayrecord_glob": f"arrayrecord:{root}/rec*/a-?",
        "tfds": "tfds:tiny_texts",
    }


def texts(corpus):
    documents = [corpus[i] for i in range(len(corpus))]
    return [text.decode() if isinstance(text, bytes) else text for text in documents]


KINDS = ["files", "jsonl", "parquet", "mixed", "arrayrecord", "arrayrecord_folder", "arrayrecord_glob", "tfds"]


@pytest.mark.parametrize("kind", KINDS)
def test_splits_are_disjoint_and_complete(specs, kind):
    splits = {split: texts(open_corpus(specs[kind], split)) for split in SPLITS}
    assert sorted(itertools.chain(*splits.values())) == sorted(DOCUMENTS)
    assert sorted(texts(open_corpus(specs[kind], "all"))) == sorted(DOCUMENTS)
    assert 250 <= len(splits["train"]) <= 290
    assert len(splits["validation"]) >= 4 and len(splits["test"]) >= 4


@pytest.mark.parametrize("kind", KINDS)
def test_random_access_and_pickling(specs, kind):
    corpus = open_corpus(specs[kind])
    documents = list(corpus)
    copy = pickle.loads(pickle.dumps(corpus))
    for i in (len(corpus) - 1, 0, len(corpus) // 2, 3):
        assert copy[i] == corpus[i] == documents[i]


def test_rows_keep_their_order(specs):
    for kind in ("jsonl", "parquet", "arrayrecord"):
        assert texts(open_corpus(specs[kind], "all")) == DOCUMENTS


def test_the_split_of_a_name_never_changes(tmp_path):
    """Names of files, and numbers of the rows of one file."""
    write_files(tmp_path / "files", [f"text {i}" for i in range(50)])
    write_jsonl(tmp_path / "rows.jsonl", list(map(str, range(50))))
    for name, expected in {
        "files": {"validation": ["text 7", "text 37", "text 38"], "test": ["text 31", "text 46"]},
        "rows.jsonl": {"validation": ["16", "18", "46", "49"], "test": ["8"]},
    }.items():
        assert {split: texts(open_corpus(str(tmp_path / name), split)) for split in SPLITS[1:]} == expected


def test_the_split_of_a_document_does_not_depend_on_the_others(specs, tmp_path):
    validation = set(texts(open_corpus(specs["files"], "validation")))
    write_files(tmp_path, DOCUMENTS[:150])
    assert set(texts(open_corpus(str(tmp_path), "validation"))) == validation & set(DOCUMENTS[:150])


@pytest.mark.parametrize("count", [3, 4, 20])
def test_few_documents_fill_every_split(tmp_path, count):
    names = [f"a{i}" for i in range(5, 5 + count)]  # the hash alone puts all of these into train
    for name in names:
        (tmp_path / f"{name}.txt").write_text(name)
    splits = [[bytes(document).decode() for document in open_corpus(str(tmp_path), split)] for split in SPLITS]
    assert [len(documents) for documents in splits] == [count - 2, 1, 1]
    assert sorted(name for documents in splits for name in documents) == sorted(names)


def test_holdout_is_a_share(specs):
    sizes = [len(open_corpus(specs["jsonl"], "test", holdout=share)) for share in (0.05, 0.2, 0.4)]
    assert sizes[0] < 30 < sizes[1] < 90 < sizes[2] < 150


def test_tfds_keeps_its_own_splits_without_tensorflow(specs):
    assert sorted(texts(open_corpus(specs["tfds"], "test"))) == sorted(DOCUMENTS[280:])
    validation = texts(open_corpus(specs["tfds"], "validation"))
    assert set(validation) < set(DOCUMENTS[:280])
    assert "tensorflow" not in sys.modules


def test_python_is_the_standard_library():
    corpus = open_corpus("python", "all")
    documents = list(corpus)
    assert sum(map(len, documents)) > 5_000_000 and all(documents)
    with open(json.__file__, "rb") as file:
        assert file.read() in documents
    with open(pytest.__file__, "rb") as file:  # in site-packages
        assert file.read() not in documents
    sizes = {split: sum(len(d) for d in open_corpus("python", split)) for split in SPLITS}
    assert sum(sizes.values()) == sum(map(len, documents)) and min(sizes.values()) > 100_000


def test_one_text_file_is_cut_into_blocks_of_lines(tmp_path):
    path = tmp_path / "input.txt"
    lines = [f"line {i} of the play\n".encode() for i in range(40_000)]
    path.write_bytes(b"".join(lines) + b"no line end")
    corpus = open_corpus(str(path), "all")
    blocks = list(corpus)
    assert b"".join(blocks) == path.read_bytes()
    assert all(block.endswith(b"\n") and 8192 <= len(block) < 8192 + 40 for block in blocks[:-1])
    splits = [set(open_corpus(str(path), split)) for split in SPLITS]
    assert set.union(*splits) == set(blocks) and sum(map(len, splits)) == len(blocks) and min(map(len, splits)) > 0


def test_folders_leave_out_what_is_not_text(tmp_path):
    write_files(tmp_path)
    for name, data in {"empty.txt": b"", "image.txt": b"GIF\0\1", ".hidden.txt": b"secret"}.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("secret")
    (tmp_path / "latin.text").write_bytes(b"caf\xe9")
    documents = list(open_corpus(str(tmp_path), "all"))
    assert sorted(documents) == sorted([text.encode() for text in DOCUMENTS] + [b"caf\xe9"])


def test_another_field(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["één", "twee"], field="body")
    write_parquet(tmp_path / "b.parquet", ["drie", None], field="body")
    assert list(open_corpus(str(tmp_path), "all", text_field="body")) == ["één", "twee", "drie", ""]


def test_errors_say_what_to_change(specs, tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "list.jsonl").write_text('["text"]\n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 junk")
    (tmp_path / "binary").write_bytes(b"\0\0")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "small.txt").write_text("a few words")
    (tmp_path / "nothing").mkdir()
    write_parquet(tmp_path / "b.parquet")
    for spec, options, message in [
        ("a.jsonl", {"split": "dev"}, "split is 'dev'; it must be"),
        ("a.jsonl", {"holdout": 0.5}, "holdout is 0.5; it must be"),
        ("a.jsonl", {"text_field": "body"}, r"a\.jsonl has no text in the field 'body' \(it has text, n\)"),
        ("b.parquet", {"text_field": "n"}, r"b\.parquet has no text in the field 'n'"),
        ("b.parquet", {"text_field": "body"}, r"b\.parquet has no text in the field 'body' \(it has n, text\)"),
        ("list.jsonl", {}, "it is a list"),
        ("broken.parquet", {}, r"broken\.parquet is not a readable Parquet"),
        ("binary", {}, "binary is not a text file"),
        ("empty.txt", {}, r"empty\.txt is empty"),
        ("small.txt", {"split": "validation"}, r"validation split of .*small\.txt is empty"),
        ("nothing", {}, r"holds no text, \*\.jsonl or \*\.parquet"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_corpus(str(tmp_path / spec), **options)
    with pytest.raises(ValueError, match=r"row 1 of .*broken\.jsonl is not JSON"):
        list(open_corpus(str(tmp_path / "broken.jsonl"), "all"))
    for spec in (str(tmp_path / "missing"), f"arrayrecord:{tmp_path}/missing*"):
        with pytest.raises(FileNotFoundError, match="missing"):
            open_corpus(spec)
    with pytest.raises(ValueError, match="not a readable ArrayRecord"):
        open_corpus(f"arrayrecord:{tmp_path}/small.txt")
    with pytest.raises(ValueError, match="has no field 'body'"):
        open_corpus(specs["tfds"], text_field="body")
    with pytest.raises(ValueError, match="has no 'no_such_texts'"):
        open_corpus("tfds:no_such_texts")
