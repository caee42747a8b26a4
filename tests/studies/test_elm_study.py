"""ELM's study in small: it runs to its end, and a second run finds everything."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxtok.configuration import load_config


def few_steps(arm):
    train = dataclasses.replace(arm.train, steps=2, eval_every=0, checkpoint_every=2)
    return dataclasses.replace(arm, train=train)


@pytest.mark.slow
def test_the_study_of_digits_runs_to_its_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = load_config("elm_study")

    def part(comparison, *names):
        arms = tuple(few_steps(arm) for arm in comparison.arms if arm.name in names)
        return dataclasses.replace(comparison, arms=arms)

    study = dataclasses.replace(
        config,
        tokenizers=part(config.tokenizers, "bae_digits", "vq_digits"),
        models=part(config.models, "ar_2_4", "masked_1_8"),
        per_class=1,
    )
    assert study.run()
    folder = Path(study.workdir)
    pictures = sorted(folder.glob("*.png"))
    assert [path.stem for path in pictures] == [
        "attention_locality",
        "reconstructions_bae_digits",
        "reconstructions_vq_digits",
        "samples_ar_2_4",
        "samples_masked_1_8",
        "statistics_256",
    ]
    assert all(np.asarray(Image.open(path).convert("L")).std() > 5 for path in pictures)
    rows = (folder / "models" / "results.md").read_text().splitlines()
    assert len(rows) == 4 and "class seen" in rows[0]
    assert float(rows[2].split("|")[-2]) > 0.9, "the proxy, which is trained in full, knows digits"
    times = [path.stat().st_mtime_ns for path in pictures]
    capsys.readouterr()
    assert study.run()
    assert [path.stat().st_mtime_ns for path in pictures] == times
