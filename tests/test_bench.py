"""The benchmark on a tiny model, and the FLOPs of its models against the matrix products that they really make."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok import bench_decoding
from jaxtok.bench import (
    CASES,
    TrainStep,
    bench,
    deletion,
    image_generation,
    image_tokenizer,
    matrix_products,
    measure,
    peer_training,
    random_batch,
)
from jaxtok.bench_decoding import METHODS
from jaxtok.lm.decoder import Decoder
from jaxtok.lm.decoder import init_params as init_decoder
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.llama import LlamaConfig
from jaxtok.lm.mrt5 import MrT5Config
from jaxtok.lm.transformer import matched_transformer
from jaxtok.model import Model
from jaxtok.training.peak import matmul_rate
from jaxtok.vision.binary_autoencoder import BAEConfig
from jaxtok.vision.elm import ElmConfig


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    small_products = functools.partial(matmul_rate, n=512)  # in less time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxtok.bench.matmul_rate", small_products)
        rows = bench(
            what=("train", "decode", "loader", "profile"), models=("tiny",), output=path, seconds=0.2, quiet=True
        )
    return rows, json.loads(path.read_text())


def test_rows_are_complete_and_round_trip(report):
    rows, written = report
    assert written["rows"] == rows
    assert written["machine"]["platform"] == jax.devices()[0].platform
    assert written["machine"]["peak_best_gigaflops"] >= written["machine"]["peak_median_gigaflops"] > 0
    assert [row["part"] for row in rows] == ["train"] * 2 + ["decode"] * 2 + ["loader"] + ["profile"] * 5
    for part in ("train", "decode", "loader", "profile"):
        keys = [set(row) for row in rows if row["part"] == part]
        assert all(k == keys[0] for k in keys)


def test_numbers_are_plausible(report):
    rows, _ = report
    train = {row["system"]: row for row in rows if row["part"] == "train"}
    assert set(train) == {"TokenFormer", "Transformer"} and train["Transformer"]["times_transformer"] == 1
    for row in train.values():
        assert 0 < row["fraction_of_peak"] < 1.5
        assert row["compile_seconds"] > 0 and row["planned_gigabytes"] > 0 and row["peak_gigabytes"] > 0
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(
            CASES["tiny"].batch_size * CASES["tiny"].length
        )
    assert all(row["tokens_per_second"] > 0 for row in rows if row["part"] == "decode")
    assert all(row["batches_per_second"] > 0 for row in rows if row["part"] == "loader")
    shares = {row["time_of"]: row["share_of_step"] for row in rows if row["part"] == "profile"}
    assert shares["forward"] + shares["backward"] + shares["optimizer"] == pytest.approx(shares["step"]) == 1


def test_deletion_is_measured_against_the_same_encoder(monkeypatch):
    monkeypatch.setattr("jaxtok.bench.matmul_rate", lambda seconds: 1e9)
    model = MrT5Config(num_layers=2, d_model=16, num_heads=1, head_size=16, mlp_dim=16, vocab_size=260, gate_layer=1)
    rows = {row["deleted"]: row for row in deletion(model, seconds=0.01, length=32)}
    assert list(rows) == ["0 %", "50 %", "80 %"] and rows["0 %"]["times_as_fast"] == 1
    assert rows["80 %"]["times_fewer_flops"] > rows["50 %"]["times_fewer_flops"] > rows["0 %"]["times_fewer_flops"] == 1
    assert all(row["seconds"] > 0 and row["fraction_of_peak"] > 0 for row in rows.values())


def test_measure_takes_turns(monkeypatch):
    monkeypatch.setattr("jaxtok.bench.matmul_rate", lambda seconds: 1e9)
    order = []
    samples = measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=1e-3)
    turns = "".join(order)
    assert turns.startswith("ab") and {len(s.seconds) for s in samples.values()} == {len(samples["a"].rates)}
    assert "ba" in turns and all((s.seconds > 0).all() for s in samples.values())


def product_flops(operands, dimension_numbers):
    """Returns the FLOPs of one product, from its key in `matrix_products`."""
    (left, _), (right, _) = operands
    (_, contracting), (_, batch) = dimension_numbers
    return 2 * math.prod(left) * math.prod(n for axis, n in enumerate(right) if axis not in (*contracting, *batch))


@pytest.mark.parametrize("system", ["TokenFormer", "Transformer"])
def test_flops_are_those_of_the_matrix_products(system):
    """They are exact except for products with the constant matrix of the rotary embedding, which are no model FLOPs."""
    model = CASES["tiny"].model if system == "TokenFormer" else matched_transformer(CASES["tiny"].model)
    task, batch = LanguageModeling(model=model), random_batch(model.vocab_size, rows=2, length=32)
    params = jax.eval_shape(task.init, jax.random.key(0), batch)

    def flops(function):
        return sum(count * product_flops(*key) for key, count in matrix_products(function, params).items())

    def loss(params):
        return task.loss(params, batch, jax.random.key(0), jnp.zeros((), jnp.int32))[0]

    tokens = batch["tokens"].size
    rotary = model.num_layers * tokens * 2 * 2 * model.d_model * model.head_dim  # of queries and keys
    assert flops(loss) - rotary == tokens * model.flops(32)
    # The gradient computes each product's two, and those of query and key a second time (`jaxtok.nn.attention.attend`).
    again = model.num_layers * tokens * 2 * 32 * model.d_model
    assert flops(jax.value_and_grad(loss)) - 2 * rotary - again == task.flops(batch)


def test_impossible_arguments():
    with pytest.raises(ValueError, match="seconds"):
        bench(seconds=0)


def test_images_are_encoded_and_drawn(monkeypatch):
    monkeypatch.setattr("jaxtok.bench.matmul_rate", lambda seconds: 1e9)
    autoencoder = BAEConfig(
        image_size=8, width=32, multipliers=(1, 1), res_blocks=1, attention_resolutions=(), embed_dim=32, bits=4
    )
    rows = list(image_tokenizer(autoencoder, seconds=0.01, batches=(2,)))
    assert [row["direction"] for row in rows] == ["encode", "decode"]
    assert all(row["images_per_second"] * row["seconds"] == pytest.approx(2) for row in rows)
    assert all(row["fraction_of_peak"] > 0 for row in rows)
    model = ElmConfig(num_layers=1, d_model=8, num_heads=2, mlp_dim=8, grid=2, code_bits=2, num_classes=2)
    (row,) = image_generation(model, seconds=0.01, batches=(2,))
    assert row["times_as_fast"] == pytest.approx(row["positions_per_second"] / row["without_cache"])
    assert row["seconds_an_image"] * row["positions_per_second"] == pytest.approx(4)


def test_methods_of_decoding(tmp_path, monkeypatch):
    """A small model that repeats itself: what is counted, and the plot."""
    monkeypatch.setattr("jaxtok.bench.matmul_rate", lambda seconds: 1e9)
    config = LlamaConfig(num_layers=1, d_model=8, num_heads=2, mlp_dim=8, vocab_size=32, max_length=128)
    params = init_decoder(Decoder(config), jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    params = jax.tree.map(jnp.zeros_like, params)  # whatever comes before, the next token is 0
    model = Model(LanguageModeling(model=config), params, None)
    monkeypatch.setattr(bench_decoding, "open_model", lambda name: model)
    monkeypatch.setattr(bench_decoding, "prompts_of", lambda model, count: [[5, 0, 0, 0, 0, 0, 0, 0]] * count)
    names = ("plain", "prompt_lookup of 7 tokens", "streaming:0.5")
    methods = {name: METHODS[name] for name in names}
    times = functools.partial(measure, seconds=0.01)
    rows = list(bench_decoding.decoding(times, batches=(1, 2), new=16, methods=methods))
    assert [(row["batch"], row["method"]) for row in rows] == [(n, name) for n in (1, 2) for name in names]
    for plain, drafted, evicted in (rows[:3], rows[3:]):
        assert plain["mean_accepted"] == plain["times_plain"] == 1 and plain["drafting_of_time"] == 0
        read = drafted["gigaflops_a_token"] / plain["gigaflops_a_token"]
        assert drafted["mean_accepted"] > 1 and read == pytest.approx(8 / drafted["mean_accepted"])
        assert drafted["drafting_of_time"] > 0 and {row["equal_tokens"] for row in rows} == {1}
        assert evicted["cache_megabytes"] < 0.5 * plain["cache_megabytes"]
    file = bench_decoding.plot(rows, tmp_path / "plot.png")
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.torch
@pytest.mark.parametrize("system", ["TokenFormer", "Transformer"])
def test_the_peer_in_pytorch_takes_the_same_steps(system):
    pytest.importorskip("transformers")
    from jaxtok.peers import TorchTrainStep

    case = CASES["tiny"]
    model = case.model if system == "TokenFormer" else matched_transformer(case.model)
    # GELU and a norm of few scores: large initial values keep the differences in the last digits small.
    step = TrainStep(dataclasses.replace(model, init_std=0.2), case.batch_size, case.length)
    peer = TorchTrainStep(model, jax.device_get(step.state.params), step.batch)
    metrics = step()  # at a learning rate of 0
    loss = peer.loss()
    loss.backward()
    squares = sum(float((p.grad**2).sum()) for p in peer.model.parameters())
    assert loss.item() == pytest.approx(float(metrics["loss"]), rel=1e-6)
    assert squares**0.5 == pytest.approx(float(metrics["gradient_norm"]), rel=1e-4)
    assert peer() > peer()


@pytest.mark.torch
def test_the_products_beside_a_step_are_those_of_its_projections():
    pytest.importorskip("transformers")
    from jaxtok.peers import Products

    products = Products(3, [(4, 6), (6, 4)])
    for (y, dx, dw), theirs in zip(products(), products.peer(), strict=True):
        for got, right in zip((y, dx, dw.T), theirs, strict=True):
            np.testing.assert_allclose(got, right, rtol=1e-5)
    *_, last = peer_training(CASES["tiny"], seconds=0.01)
    assert last["work"] == "a block's products" and last["times_as_fast"] > 0
    assert last["products_times_as_fast"] == pytest.approx(last["times_as_fast"], rel=1)
