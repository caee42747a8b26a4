"""Every verb on every row of the catalogue: what the catalogue ticks works, and the rest ends with one clear sentence.

`pytest --slow -s tests/test_every_verb.py` prints the table: row, verb, exit code, last line of what was written.
"""

import dataclasses
import functools
import json
import sys
from pathlib import Path

import pytest
from collector import collect

from jaxtok.cli import main
from jaxtok.configuration import load_config, to_json
from jaxtok.data.codes import CodeData
from jaxtok.data.images import ImageData
from jaxtok.data.volumes import VolumeData
from jaxtok.decoding.trigram_table import build_table, save_table
from jaxtok.interop.formats import FORMATS
from jaxtok.multimodal.image_text import ImageTextData, write_documents
from jaxtok.protocols import ImageGenerator, ImageTokenizer
from jaxtok.systems import SYSTEMS, config_entries, configs_folder
from jaxtok.tokenizers import load_tokenizer
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.mesh import MeshConfig
from jaxtok.transfer.lora import Lora
from jaxtok.vision.token_statistics import MapsAttention
from jaxtok.vision.tokenbridge_tokenizer import DimensionwiseQuantizer

sys.path.insert(0, str(Path(__file__).parent / "interop"))
from test_formats import CASES as FORMAT_CASES

pytestmark = pytest.mark.slow

FROM_TASKS = {"vit": "tokenformer_vit", "lexinvariant": "semi_lexinvariant"}  # the body of parameter tokens grows
"""Rows whose tiny case is one of `TASKS` of another name."""

FROM_FORMATS = {
    "gpt2": "gpt2",
    "opt": "opt",
    "llama": "llama, a tokenizer.json",
    "electra": "electra, variables",
    "hat_released": "hat",
    **{name: name for name in ("mamba", "tokenformer", "bert", "t5", "mrt5", "word_pooled", "byte2word", "tokenunify")},
}
"""Rows whose tiny case is one of those with which formats are tested."""


def tiny_task(row: str):
    """A task with its data, in a size that trains at once and of which every id of the data is known."""
    if row in FROM_FORMATS:
        case = FORMAT_CASES[FROM_FORMATS[row]]()
        return case.task, case.data
    case = collect("TASKS")[FROM_TASKS.get(row, row)]()
    task, data = case.task, case.data
    if row == "flextok_generation":  # as the codes of the row flextok
        return task.with_model(length=16, num_classes=10), dataclasses.replace(data, shape=(16,))
    if row == "tokenbridge":  # the codes of the row bae, of two sub-codes
        sizes = {"channels": 2, "channel_order": (), "num_classes": 10, "quantizer": DimensionwiseQuantizer(levels=16)}
        return task.with_model(**sizes), dataclasses.replace(data, values=(16, 16))
    if isinstance(data, CodeData):  # as the codes of the row bae
        return task.with_model(code_bits=4, sub_codes=2, num_classes=10), dataclasses.replace(
            data, code_bits=4, sub_codes=2
        )
    if row == "vit":
        return task.with_model(num_classes=10), data
    return (
        task if isinstance(data, ImageData | ImageTextData) or row == "hat" else task.with_model(vocab_size=384)
    ), data


@dataclasses.dataclass
class Desk:
    """Where the command is called: each call is a row of the table."""

    folder: Path
    texts: str
    capture: object
    rows: list[tuple[str, str, str, str]] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)
    """What did not go as the catalogue says; collected, so that one call of the test shows all of it."""
    row: str = ""

    def call(self, what: str, *arguments: object, works: bool = True) -> str:
        """Calls the command; returns what it wrote. It has to work, or to end with code 1 and one sentence."""
        self.capture.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as error:  # of --help, and of options that do not exist
            code = error.code
        except Exception as error:
            code = f"{type(error).__name__}: {error}"
        out, err = (text.decode(errors="replace") for text in self.capture.readouterr())
        lines = [line.strip() for line in (out if code == 0 else err).splitlines() if line.strip()]
        message = " ".join(err.split())
        shown = (lines[-1] if lines else "") if code == 0 else message[message.rfind("error:") :] or "nothing"
        self.rows.append((self.row, what, str(code), shown))
        with self.capture.disabled():
            print("| {} | {} | {} | {} |".format(*(cell.replace("|", "\\|") for cell in self.rows[-1])))
        said = f"{self.row}, {what} ({' '.join(map(str, arguments))}): {code}, {message[-2000:]}"
        sentence = message.startswith("error: ") and message.endswith((".", "?")) and len(message) < 600
        if "Traceback" in err or code != 1 - works or not (works or sentence):
            self.failures.append(said)
        return out

    def expect(self, true: bool, what: str) -> None:
        if not true:
            self.failures.append(f"{self.row}: it is not so that {what}")

    def config(self, name: str, task, data, **fields) -> Path:
        """A config file, as one would write it."""
        train = TrainConfig(steps=3, checkpoint_every=2, eval_every=0, tensorboard=False)
        experiment = Experiment(
            task=task, data=data, train=train, mesh=MeshConfig(data=1), workdir=str(self.folder / name), **fields
        )
        file = self.folder / f"{name}.py"
        file.write_text(
            f"import json\n\nfrom jaxtok.configuration import from_json\n\n"
            f"config = from_json(json.loads({json.dumps(to_json(experiment))!r}))\n"
        )
        return file

    def numbers(self, what: str, path: Path, *options: str) -> dict[str, float]:
        """What `eval` measures."""
        file = self.folder / f"{what.replace(' ', '_')}.json"
        self.call(what, "eval", path, "--batches", "2", "--output", file, *options)
        row = json.loads(file.read_text()) if file.exists() else {}
        return {name: value for name, value in row.items() if isinstance(value, float)}


PLANNED = ("tokenformer", "m2r2", "skipdecode", "extensible", "mamba")
"""Rows whose run is planned for a TPU, by its compiler."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(60):
        words = f"number {number}, twice {2 * number}, thrice {3 * number}; naïve words and so on.\n"
        (folder / f"{number}.txt").write_text(words * 12)
    return str(folder)


@pytest.fixture
def desk(tmp_path, texts, capfdbinary):
    return Desk(tmp_path, texts, capfdbinary)


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    """The folder of the codes of a run of a row of a tokenizer."""

    @functools.cache
    def make(row: str) -> Path:
        folder = tmp_path_factory.mktemp("codes")
        maker = Desk(folder, "", None)
        file = maker.config("run", *tiny_task(row))
        assert main(["train", str(file)]) == 0
        splits = ["--splits", "train", "validation"]
        assert main(["vision", "tokenize", str(folder / "run"), str(folder / "codes"), *splits]) == 0
        return folder / "codes"

    return make


def suffix_of(form) -> str:
    """Of what it writes."""
    return "" if not form.is_file else ".npz" if form.name == "electra_tensorflow" else ".safetensors"


@pytest.mark.parametrize("row", [row for row in SYSTEMS if "train" not in row.cannot], ids=lambda row: row.name)
def test_every_verb(row, desk, request):
    desk.row, folder = row.name, desk.folder
    task, data = tiny_task(row.name)
    of_text = not isinstance(data, CodeData | ImageData | ImageTextData | VolumeData)
    options = {"corpus": desk.texts} if of_text else {}
    if isinstance(data, CodeData):
        maker = "flextok" if row.name == "flextok_generation" else "bae"
        options["path"] = str(request.getfixturevalue("codes")(maker))
        options["path"] = str(request.getfixturevalue("codes"))
    if isinstance(data, ImageTextData):
        options["path"] = str(folder / "documents")
        codes = list(range(data.image_codes))
        for split in ("train", "validation", "test"):
            write_documents(folder / "documents" / f"{split}.jsonl", [{"parts": ["a", codes]}] * 40)
    if of_text and hasattr(data, "shuffle_window"):
        options["shuffle_window"] = 8
    data = dataclasses.replace(data, eval_limit=1, **options)
    file, run = desk.config("run", task, data), folder / "run"
    inner = task.task if isinstance(task, Lora) else task

    desk.call("train", "train", file)
    resumed = desk.call("resume", "train", run)
    desk.expect("step 3" in " ".join(resumed.split()), "resume says its step")
    first = desk.numbers("eval", run)
    desk.expect(first and first == desk.numbers("eval again", run), "two evaluations are the same")
    if of_text:
        desk.numbers("eval on texts", run, "--corpus", desk.texts, "--split", "test")

    writes = of_text and "generate, cached" not in row.cannot
    desk.call(
        "generate", "generate", run, "--prompt", "number ", "--max-new-tokens", "6", "--temperature", "0", works=writes
    )
    sees, draws = isinstance(inner, ImageTokenizer), isinstance(inner, ImageGenerator)
    maps = isinstance(inner, MapsAttention)
    desk.call("vision tokenize", "vision", "tokenize", run, folder / "codes", "--splits", "validation", works=sees)
    desk.call("vision reconstruct", "vision", "reconstruct", run, folder / "r.png", "--batches", "1", works=sees)
    statistics = ["vision", "statistics", folder / "codes" if sees else run, "--output", folder / "s.png"]
    desk.call("vision statistics", *statistics, "--split", "validation", works=sees)
    drawn = ["vision", "generate", run, folder / "g.png", "--per-class", "1", "--labels", "3"]
    desk.call("vision generate", *drawn, works=draws)
    desk.call("vision attention", "vision", "attention", run, "--output", folder / "a.png", works=maps)

    grows = "grow" not in row.cannot
    desk.call("grow", "grow", run, "--times", "2", "--output", folder / "grown", "--steps", "1", works=grows)
    if grows:
        desk.call("train what was grown", "train", folder / "grown")
    else:
        desk.expect(not (folder / "grown").exists(), "a growth that is refused leaves nothing")
    desk.call("grow to", "grow", run, "--to.ffn", "64", "--output", folder / "grown-to", works=grows)

    small = ["--lora.rank", "2", "--steps", "2"]
    # parameter tokens are no projections, which LoRA's default is
    if row.name in ("tokenformer", "lexinvariant"):
        desk.call("adapt its projections", "adapt", run, "--output", folder / "adapted", *small, works=False)
        small += ["--lora.targets", "embedding"]
    desk.call("adapt", "adapt", run, "--output", folder / "adapted", *small, works=of_text)
    if of_text:
        desk.call("train what was adapted", "train", folder / "adapted")
        desk.numbers("eval what was adapted", folder / "adapted")
        if writes:
            desk.call(
                "generate with the adapter", "generate", folder / "adapted", "--prompt", "a", "--max-new-tokens", "3"
            )

    there_and_back(row, desk, file, run, first, task)
    listed(row, desk)
    if row.name in PLANNED:
        planned(desk, file)
    assert not desk.failures, "\n\n".join(desk.failures)


def listed(row, desk):
    for entry in (entry for config in row.configs for entry in config_entries(configs_folder() / config)):
        desk.call(f"{entry.verb} {entry.name} --help", entry.verb, entry.name, "--help")
    desk.expect(row.title in desk.call("list", "list", row.name), "the list has the row")


WAYS = {
    "token_recycling": ["--drafter", "token_recycling:{folder}/matrix.safetensors"],
    "aded": ["--drafter", "aded:{folder}/table.safetensors"],
    "keyformer": ["--evict", "keyformer:0.5"],
    "awrs": ["--constrain", "regex:[0-9]+"],
    "byte_exact": ["--exact-bytes"],
}
"""Rows that are ways to generate from any language model: the options of `generate` that are theirs."""


def test_every_way_to_generate(desk):
    """A drafter changes nothing, alone and with all others; an evictor, a constraint and exact bytes go together."""
    folder = desk.folder
    task, data = tiny_task("llama")
    data = dataclasses.replace(data, corpus=desk.texts, shuffle_window=8)
    desk.config("run", task, data)
    assert main(["train", str(folder / "run.py")]) == 0
    tokenizer = load_tokenizer(data.tokenizer)
    texts = [tokenizer.encode(file.read_bytes()) for file in sorted(Path(desk.texts).iterdir())]
    save_table(folder / "table.safetensors", build_table(texts, tokenizer.vocab_size), tokenizer)

    def says(what: str, *options: str) -> str:
        prompts = ["--prompt", "number 1, tw", "naïve", "--max-new-tokens", "24", "--temperature", "0"]
        given = [option.format(folder=folder) for option in options]
        return desk.call(f"generate {what}", "generate", folder / "run", *prompts, *given)

    assert WAYS.keys() == {row.name for row in SYSTEMS if "train" in row.cannot}
    plain, drafters = says("plainly"), [options for options in WAYS.values() if options[0] == "--drafter"]
    for row in (row for row in SYSTEMS if row.name in WAYS):
        desk.row = row.name
        said = says("so", *WAYS[row.name])
        if WAYS[row.name] in drafters:
            desk.expect(said == plain, "a drafter changes nothing")
        listed(row, desk)
    desk.row = "all"
    drafter = ["--drafter", "+".join(["suffix_automaton", "prompt_lookup", *(name for _, name in drafters)])]
    desk.expect(says("with all drafters", *drafter) == plain, "drafters change nothing")
    rest = [*WAYS["keyformer"], *WAYS["awrs"]]
    desk.expect(says("with all", *drafter, *rest) == says("with all but drafters", *rest), "drafters change nothing")
    exact = [*WAYS["byte_exact"], *WAYS["keyformer"]]
    desk.expect(says("exactly", *drafter, *exact) == says("without drafts", *exact), "drafters change nothing")
    assert not desk.failures, "\n\n".join(desk.failures)


def there_and_back(row, desk, file, run, first, task):
    """Every format that owns the model, and a run again, which measures what the first did."""
    folder = desk.folder
    base = []
    if isinstance(task, Lora):  # the base is written first
        base_run = desk.config("base", task.task, load_config(file).data)
        desk.call("train its base", "train", base_run)
        desk.call("convert its base", "convert", folder / "base", folder / "base-folder")
        base = ["--base", folder / "base-folder"]
        made = ["adapt", folder / "base-folder", "--output", folder / "of-base", "--corpus", desk.texts]
        desk.call("adapt a folder", *made, "--lora.rank", "2", "--steps", "2")
        desk.call("train it", "train", folder / "of-base")
        run, first = folder / "of-base", desk.numbers("eval it", folder / "of-base")
    owners = [form for form in FORMATS if form.owns(task)]
    desk.expect({form.name for form in owners} == set(row.formats), f"formats {[form.name for form in owners]}")
    if not owners:
        desk.call("convert", "convert", run, folder / "none", works=False)
        desk.expect(not (folder / "none").exists(), "a conversion that is refused leaves nothing")
    for form in owners:
        target, back = folder / f"as-{form.name}{suffix_of(form)}", folder / f"back-from-{form.name}"
        desk.call(f"convert to {form.name}", "convert", run, target, "--format", form.name, *base)
        again = ["--config", file] if form.is_file else []
        desk.call(f"convert from {form.name}", "convert", target, back, *again)
        corpus = [] if form.is_file else ["--corpus", desk.texts]
        found = desk.numbers(f"eval of {form.name}", back, *corpus)
        near = pytest.approx(first, rel=1e-5 if isinstance(task, Lora) else 1e-7)
        same = found == near or form.name == "electra"  # which holds no generator, on which the measures depend
        desk.expect(
            same,
            f"what came back from {form.name} measures {found} instead of {first}",
        )
        desk.call(f"train from {form.name}", "train", back, *train_on(form, back, desk))


def train_on(form, back, desk) -> list[object]:
    """What a run of something that was read needs to be trained a step."""
    if form.is_file:
        return []
    return ["--data.corpus", desk.texts, "--train.steps", "1", "--workdir", f"{back}-on", "--start", back]


def planned(desk, file):
    pytest.importorskip("libtpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "")  # the TPU compiler reads them too
        desk.call("plan", "plan", file, "--topology", "v5e:1x1")
