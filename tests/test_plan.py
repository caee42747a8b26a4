"""`jaxtok plan`: real compilations for small TPU slices, without any of them."""

from __future__ import annotations

import builtins
import dataclasses
import json
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from jaxtok import plan_decoding
from jaxtok.cli import main
from jaxtok.data.text import TextData
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.llama import LlamaConfig
from jaxtok.lm.tokenformer import TokenFormerConfig, uniform_counts
from jaxtok.plan import SLICES, advice, part_of, plan, remat_of, topology_devices, variants
from jaxtok.training.experiment import Experiment
from jaxtok.training.mesh import MeshConfig, make_layout

EXPERIMENT = Experiment(
    name="tiny",
    task=LanguageModeling(
        model=TokenFormerConfig(
            num_layers=3,
            d_model=128,
            num_heads=2,
            tokens=uniform_counts(128, 512),
            vocab_size=256,
            max_length=256,
            dtype="bfloat16",
            remat="projections",
        )
    ),
    data=TextData(length=256, batch_size=8),
    mesh=MeshConfig(fsdp=2, data=2),
)

libtpu = pytest.mark.skipif(
    sys.platform != "linux" or pytest.importorskip("libtpu") is None, reason="needs the TPU compiler"
)


@pytest.fixture(autouse=True)
def flags(monkeypatch):
    """The TPU compiler reads them too, and ends the process at one that it does not know."""
    monkeypatch.setenv("XLA_FLAGS", "")


@libtpu
def test_a_step_for_a_slice_that_is_not_there(tmp_path, capsys):
    (row,) = plan(EXPERIMENT, "v5e:2x2", output=tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text()) == [row]
    assert row["fits"] and row["devices"] == 4 and row["chip"] == "TPU v5 lite"
    assert row["hbm_of_chip_gigabytes"] == pytest.approx(17.18, abs=0.01)
    flops = EXPERIMENT.task.flops({"tokens": np.zeros((8, 256))}) / 4
    assert row["model_teraflops"] == pytest.approx(flops / 1e12)
    assert row["fraction_of_peak"] == pytest.approx(flops / row["step_seconds"] / 197e12)
    assert row["tokens_per_second"] == pytest.approx(8 * 256 / row["step_seconds"])
    assert 0 < row["arguments_gigabytes"] < row["hbm_gigabytes"]
    seconds = row["seconds"]
    assert seconds["operations"] > flops / 197e12, "no operation is faster than the peak"
    assert seconds["kernels"] > 0, "attention is the kernel's"
    assert sum(row["largest_costs"].values()) <= seconds["operations"] + seconds["kernels"]
    gathers = sum(c["gigabytes"] for c in row["collectives"] if c["kind"] == "all-gather")
    # forward and again in the backward pass, in bfloat16, half of it from the other device
    assert gathers == pytest.approx(2 * 2 * (row["parameters"] - 256) / 2 / 1e9, rel=0.5)
    printed = capsys.readouterr().out
    for part in ("fits", "(estimate)", "the compiler's estimate", "Nothing was run"):
        assert part in printed


@libtpu
def test_a_step_that_does_not_fit_says_what_to_change(capsys):
    big = dataclasses.replace(
        EXPERIMENT,
        task=dataclasses.replace(EXPERIMENT.task, model=dataclasses.replace(EXPERIMENT.task.model, vocab_size=2**17)),
        data=dataclasses.replace(EXPERIMENT.data, batch_size=1024),
    )
    (row,) = plan(big, "v5e:2x2")
    assert not row["fits"] and row["hbm_gigabytes"] > row["hbm_of_chip_gigabytes"]
    printed = capsys.readouterr().out
    assert "does not fit" in printed and "train.accumulate = 2" in printed


@libtpu
def test_a_decoding_step(tmp_path, capsys, monkeypatch):
    """What is compiled is the engine's step: drafts make it longer, a smaller cache takes less memory."""
    monkeypatch.setattr(plan_decoding, "WIDTHS", (8,))
    monkeypatch.setattr(plan_decoding, "EVICTORS", {"window": None})
    model = LlamaConfig(num_layers=2, d_model=256, num_heads=2, mlp_dim=512, vocab_size=512, max_length=640)
    rows = plan_decoding.plan_decoding(model, "v5e:1x1", prompt=512, new=64, output=tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text()) == rows
    plain, chain, tree, window = rows
    slot = 2 * 2 * 256 * 2 + 2 * 4  # keys and values of two layers in bfloat16, and a position
    assert plain["cache_gigabytes"] * 1e9 == pytest.approx(576 * slot, rel=0.01)
    assert [row["tokens"] for row in rows] == [1, 8, 81, 1]
    assert 0 < chain["milliseconds"] < tree["milliseconds"] and plain["times_plain"] == 1
    assert window["cache_gigabytes"] < 0.5 * plain["cache_gigabytes"]
    assert "Nothing was run" in capsys.readouterr().out
    with pytest.raises(ValueError, match="at most the model's max_length = 640"):
        plan_decoding.plan_decoding(model, "v5e:1x1", prompt=640)


@libtpu
def test_decoding_is_planned_by_the_verb(capsys, monkeypatch):
    monkeypatch.setattr(
        "jaxtok.plan_decoding.plan_decoding", lambda model, *given, **options: [{"fits": model.num_layers == 32}]
    )
    assert main(["plan", "llama-2-7b", "--decode"]) == 0 and main(["plan", "tokenformer_small", "--decode"]) == 1
    monkeypatch.undo()
    assert main(["plan", "mrt5_small", "--decode"]) == 1
    assert "decoding is planned for decoders" in capsys.readouterr().err


@pytest.mark.slow
@libtpu
def test_a_sweep_ranks_meshes_and_policies(capsys):
    devices = topology_devices("v5e:2x2")
    cases = list(variants(EXPERIMENT, len(devices)))
    assert {c.mesh.tensor for c in cases} == {1} and {c.task.model.remat for c in cases} == {
        "full",
        "projections",
        "dots",
    }
    rows = plan(EXPERIMENT, "v5e:2x2", sweep=True)
    assert len(rows) == len(cases) == 3
    assert [row["step_seconds"] for row in rows] == sorted(row["step_seconds"] for row in rows)
    assert rows[0]["remat"] != "full", "that computes more"
    assert capsys.readouterr().out.count("fsdp 4") >= 3


@libtpu
def test_advice_for_parameters_that_are_too_many():
    layout = make_layout(MeshConfig(data=4), topology_devices("v5e:2x2"))
    from jaxtok.plan import CHIPS

    chip = dataclasses.replace(CHIPS["TPU v5 lite"], hbm=1e6)
    full = dataclasses.replace(EXPERIMENT.task.model, remat="dots")
    experiment = dataclasses.replace(EXPERIMENT, task=dataclasses.replace(EXPERIMENT.task, model=full))
    texts = advice(experiment, layout, chip)
    assert "raise mesh.fsdp (now 1)" in texts[0] and "remat = full (now dots)" in texts[1]


def test_remat_of_a_model_in_parts():
    assert remat_of(EXPERIMENT.task.model) == "projections"
    parts = [dataclasses.replace(EXPERIMENT.task.model, remat=remat) for remat in ("full", "dots", "full")]
    assert remat_of(dataclasses.make_dataclass("Model", ["encoder", "backbone", "decoder"])(*parts)) == "dots, full"
    assert remat_of(None) == "none"


@libtpu
def test_what_cannot_be_planned():
    with pytest.raises(ValueError, match=r"topology is 'v5e:3x5', unknown to the TPU compiler.*CHIP:AxB"):
        plan(EXPERIMENT, "v5e:3x5")
    with pytest.raises(ValueError, match=r"mesh .* does not fit 4 devices"):
        plan(dataclasses.replace(EXPERIMENT, mesh=MeshConfig(fsdp=8)), "v5e:2x2")
    assert len(topology_devices("v5p-512")) == len(topology_devices(SLICES["v6e-256"])) == 256


def test_without_the_compiler(monkeypatch):
    original = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "libtpu":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match="pip install libtpu"):
        plan(EXPERIMENT, "v5e:2x2")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("jit(train_step)/transpose(jvp(Decoder))/while/body/checkpoint/blocks/ffn/d,nd->n", "backward: ffn"),
        (
            "jit(train_step)/transpose(jvp(D))/checkpoint/rematted_computation/blocks/attention/query/x",
            "recomputed: attention/query",
        ),
        ("jit(train_step)/jvp(Decoder)/while/blocks/attention/blhd,de->blhe", "forward: attention between tokens"),
        ("jit(train_step)/jvp(Decoder)/Decoder.head/dot_general", "forward: head"),
        ("jit(train_step)/jvp()/reduce_sum", "forward: loss"),
        ("jit(train_step)/mul", "update: optimizer"),
    ],
)
def test_places(source, expected):
    assert part_of(source) == expected


@pytest.mark.skipif(find_spec("jax_cuda12_plugin") is None, reason="needs the GPU compiler, jax-cuda12-plugin")
def test_gpus_that_are_not_there(capsys):
    (row,) = plan(EXPERIMENT, "h100:2x2")
    assert row["fits"] and row["devices"] == 4 and "H100" in row["chip"] and "step_seconds" not in row
    assert row["temporaries_gigabytes"] > 0 and {c["kind"] for c in row["collectives"]} >= {"all-gather"}
    assert "it tells no times" in capsys.readouterr().out


def test_gpus_by_another_name_or_without_their_compiler(monkeypatch):
    with pytest.raises(ValueError, match="must be h100:N for N GPUs"):
        plan(EXPERIMENT, "h100")
    monkeypatch.setattr("jaxtok.plan.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install jax-cuda12-plugin"):
        plan(EXPERIMENT, "h100:4")
