"""The paper's claim at a small size: a trained gate deletes what the task does not need."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxtok.configuration import load_config
from jaxtok.data.character_edits import VOWELS
from jaxtok.lm.mrt5 import begin
from jaxtok.training.checkpoints import load


@pytest.mark.slow
def test_a_gate_finds_the_vowels(tmp_path):
    """Texts without their vowels: the study's gate, against random deletion of a fifth of the bytes, from one ByT5."""
    study = load_config("mrt5_study")
    gate, random = (next(arm for arm in study.arms if name in arm.name) for name in ("25 %", "random"))
    model = dataclasses.replace(random.task.model, amount=0.2)
    random = dataclasses.replace(random, task=dataclasses.replace(random.task, model=model))
    study = dataclasses.replace(study, arms=(gate, random), measures=(), workdir=str(tmp_path))
    assert study.run()
    results = json.loads((tmp_path / "results.json").read_text())
    gated, by_chance = (next(row["test"] for row in results.values() if row["arm"] == arm.name) for arm in study.arms)

    run, data = load(study.experiment(gate, 0).directory), study.experiment(gate, 0).data
    ids = np.frombuffer(VOWELS, np.uint8) + 3
    vowels = real = deleted = vowels_deleted = 0
    for batch in dataclasses.replace(data, eval_limit=8).eval_batches("test"):
        begun, _ = begin(run.task, run.params, batch["tokens"], jax.random.key(0))
        mask, gone = np.asarray(begun.mask), np.asarray(begun.mask & ~begun.kept)
        is_vowel = np.isin(batch["tokens"], ids) & mask
        vowels, real = vowels + is_vowel.sum(), real + mask.sum()
        deleted, vowels_deleted = deleted + gone.sum(), vowels_deleted + (gone & is_vowel).sum()
    print({"gate": gated, "random": by_chance, "vowels among deleted": vowels_deleted / deleted, "all": vowels / real})
    assert 0.15 < gated["deletion_rate"] < 0.25 and 0.15 < by_chance["deletion_rate"] < 0.25
    assert gated["bits_per_byte"] < 0.75 * by_chance["bits_per_byte"]
    assert vowels_deleted / deleted > 1.8 * vowels / real
