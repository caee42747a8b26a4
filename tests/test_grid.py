"""The README's grid of models and what can be done with them: each cell is tested where it says, or has its reason."""

import re
from pathlib import Path

import pytest
from collector import collect

TASKS, CAUSAL_LMS = collect("TASKS"), collect("CAUSAL_LMS")
TESTS = Path(__file__).parent
COLUMNS = ("train", "evaluate", "generate, cached", "grow", "shard", "import", "export")

BY_TASK = ("train", "evaluate", "shard")
"""Every entry of `TASKS` is trained on one device and on every mesh (tests/training/test_mesh.py) and evaluated
(test_tasks.py)."""

REASONS = {
    "a": "an encoder: it does not generate",
    "b": "growth appends parameter tokens, and it has none",
    "c": "no weights were released, so there is no layout to read or write; runs are saved and restored as all are",
    "d": "it generates in rounds over all positions, for which there is nothing to cache",
    "e": "it decodes the codes that others generate",
}

FOLDERS = "interop/test_huggingface.py::test_written_then_read_is_the_same"
ENCODERS = "lm/test_encoders_parity.py::test_with_the_library_itself"

GRID = {
    "TokenFormer": {
        "task": "tokenformer",
        "generate, cached": "tokenformer",
        "grow": "training/test_mesh.py::test_growth_happens_where_the_parameters_are",
        "import": "interop/test_tokenformer_checkpoint.py::test_round_trip",
        "export": "interop/test_tokenformer_checkpoint.py::test_round_trip",
    },
    "GPT-2": {
        "task": "gpt2",
        "generate, cached": "gpt2",
        "grow": "b",
        "import": FOLDERS,
        "export": FOLDERS,
    },
    "Llama, Mistral, Qwen2, Gemma": {
        "task": "llama",
        "generate, cached": "llama",
        "grow": "b",
        "import": FOLDERS,
        "export": FOLDERS,
    },
    "BERT, RoBERTa, XLM-R": {
        "task": "masked_words",
        "generate, cached": "a",
        "grow": "b",
        "import": ENCODERS,
        "export": "lm/test_encoders_parity.py::test_written_then_read_is_the_same",
    },
    "T5, mT5, ByT5": {
        "task": "t5",
        "generate, cached": "lm/test_t5_parity.py::test_generation",
        "grow": "b",
        "import": "lm/test_t5_parity.py::test_with_the_library_itself",
        "export": "lm/test_t5_parity.py::test_written_then_read_is_the_same",
    },
    "MrT5": {
        "task": "mrt5",
        "generate, cached": "lm/test_mrt5.py::test_evaluation_and_generation",
        "grow": "b",
        "import": "lm/test_mrt5.py::test_written_then_read_is_the_same",
        "export": "lm/test_mrt5.py::test_written_then_read_is_the_same",
    },
    "HAT (paper)": {
        "task": "hat",
        "generate, cached": "lm/test_hat.py::test_generation_is_what_a_full_pass_says",
        "grow": "b",
        "import": "c",
        "export": "c",
    },
    "HAT (released)": {
        "task": "hat_released",
        "generate, cached": "lm/test_hat.py::test_released_generation_is_what_a_full_pass_says",
        "grow": "b",
        "import": "lm/test_hat.py::test_a_written_folder_is_read_again",
        "export": "lm/test_hat.py::test_a_written_folder_is_read_again",
    },
    "Learn Your Tokens": {
        "task": "word_pooled",
        "generate, cached": "lm/test_word_pooled.py::test_cached_generation_is_recomputation",
        "grow": "b",
        "import": "lm/test_word_pooled.py::test_written_then_read_is_the_same",
        "export": "lm/test_word_pooled.py::test_written_then_read_is_the_same",
    },
    "Byte2Word": {
        "task": "byte2word",
        "generate, cached": "a",
        "grow": "b",
        "import": "lm/test_byte2word.py::test_a_bert_lends_its_body",
        "export": "c",
    },
    "Lexinvariant": {
        "task": "lexinvariant",
        "generate, cached": "lexinvariant",
        "grow": "lm/test_lexinvariant.py::test_a_body_of_parameter_tokens_grows",
        "import": "c",
        "export": "c",
    },
    "ELECTRA": {
        "task": "electra",
        "generate, cached": "a",
        "grow": "b",
        "import": "lm/test_electra.py::test_hugging_face_folders",
        "export": "lm/test_electra.py::test_hugging_face_folders",
    },
    "VQGAN, BAE": {
        "task": "bae",
        "generate, cached": "e",
        "grow": "b",
        "import": "vision/test_autoencoding.py::test_official_checkpoints_both_ways",
        "export": "vision/test_autoencoding.py::test_official_checkpoints_both_ways",
    },
    "ELM": {
        "task": "elm",
        "generate, cached": "vision/test_elm.py::test_cached_is_recomputed",
        "grow": "b",
        "import": "interop/test_elm_checkpoint.py::test_written_then_read_is_the_same",
        "export": "interop/test_elm_checkpoint.py::test_written_then_read_is_the_same",
    },
    "ELM (masked)": {
        "task": "elm_masked",
        "generate, cached": "d",
        "grow": "b",
        "import": "interop/test_elm_checkpoint.py::test_written_then_read_is_the_same",
        "export": "interop/test_elm_checkpoint.py::test_written_then_read_is_the_same",
    },
}
"""By model: its entry in `TASKS`, and for each column an entry of `CAUSAL_LMS`, a test, or the letter of a reason."""


def cells(row):
    evidence = dict.fromkeys(BY_TASK, row["task"]) | row
    return ["✓" if evidence[column] not in REASONS else evidence[column] for column in COLUMNS]


def test_every_cell_is_tested_or_has_a_reason():
    for model, row in GRID.items():
        assert row["task"] in TASKS, model
        for column in set(COLUMNS) - set(BY_TASK):
            evidence = row[column]
            if "::" in evidence:
                file, test = evidence.split("::")
                assert re.search(rf"^def {test}\(", (TESTS / file).read_text(), re.M), evidence
            else:
                assert evidence in REASONS or (column == "generate, cached" and evidence in CAUSAL_LMS), evidence


def test_the_readme_has_the_grid():
    lines = [["model", *COLUMNS], ["---"] + [":-:"] * len(COLUMNS)]
    lines += [[name, *cells(row)] for name, row in GRID.items()]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    reasons = "; ".join(f"{letter}: {reason}" for letter, reason in REASONS.items())
    readme = (TESTS.parent / "README.md").read_text()
    if table not in readme or reasons not in " ".join(readme.split()):
        pytest.fail(f"README.md should have this grid:\n{table}\n{reasons}")
