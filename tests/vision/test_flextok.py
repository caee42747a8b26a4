"""FlexTok: exact properties of the tokenizer and of the model of its tokens, and what is refused."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import Case, typed

from jaxtok.data.codes import CodeData
from jaxtok.data.images import ImageData
from jaxtok.interop import flextok as interop
from jaxtok.nn.quantizers import FiniteScalars, corrupted
from jaxtok.nn.rectified_flow import Guidance, euler, noised
from jaxtok.training.mesh import unboxed
from jaxtok.vision import flextok, flextok_generation
from jaxtok.vision.flextok import FlexTok, FlexTokConfig, FlexTokenizer, FlowSampling, Projection, Repa, draw_kept
from jaxtok.vision.flextok_generation import FlexTokGPT, FlexTokGPTConfig, FlexTokModeling, FlexTokSampling
from jaxtok.vision.kl_vae import KLVAEConfig
from jaxtok.vision.vit import LinearViTConfig

CONFIG = FlexTokConfig(
    latent_size=(8, 8),
    channels=3,
    registers=8,
    levels=(8, 5, 5),
    encoder_width=16,
    encoder_depth=2,
    decoder_width=24,
    decoder_depth=2,
    head_dim=8,
    time_channels=16,
)
TASK = FlexTokenizer(model=CONFIG, sampling=FlowSampling(steps=2))
GPT = FlexTokGPTConfig(num_layers=2, d_model=16, num_heads=2, mlp_dim=24, length=8, codebook=200, num_classes=4)


def case(task, data, batch):
    return Case(task, data, typed(data, batch))


def images_case() -> Case:
    """Images, one of which only fills the batch, in a size that eight devices can divide."""
    rng = np.random.default_rng(0)
    sizes = {"encoder_width": 32, "decoder_width": 32, "head_dim": 4, "mlp_ratio": 3.0, "null": "zero"}
    model = dataclasses.replace(CONFIG, **sizes, registers=16, head_modulation=True)
    batch = {
        "images": rng.integers(0, 256, (8, 8, 8, 3)),
        "labels": np.zeros(8),
        "mask": np.arange(8) < 7,
    }
    task = FlexTokenizer(model=model, sampling=FlowSampling(steps=2, guidance=2.0), corrupt=0.5, eval_prefixes=(1,))
    return dataclasses.replace(case(task, ImageData(images="digits", size=8, batch_size=8), batch), drawn=True)


def codes_case() -> Case:
    rng = np.random.default_rng(0)
    sizes = {"d_model": 32, "num_heads": 8, "mlp_dim": 32, "loss_chunk": 4}
    model = dataclasses.replace(GPT, **sizes)
    data = CodeData(shape=(8,), values=(200,), batch_size=8)
    batch = {"codes": rng.integers(0, 200, (8, 8, 1)), "labels": rng.integers(0, 4, 8), "mask": np.arange(8) < 7}
    return case(FlexTokModeling(model=model), data, batch)


TASKS = {"flextok": images_case, "flextok_generation": codes_case}
EVIDENCE = {"flextok_generation": {"generate, cached": "vision/test_flextok.py::test_cached_is_recomputed"}}
IMAGE_TOKENIZERS = {
    "flextok": lambda: dataclasses.replace(TASK, model=dataclasses.replace(CONFIG, registers=4)),
    "flextok_vae": lambda: dataclasses.replace(
        TASK,
        model=dataclasses.replace(CONFIG, registers=4, channels=2),
        latents="vae",
        vae=KLVAEConfig(image_size=16, widths=(8, 8), res_blocks=1, encoder_attention=(), z_channels=2, groups=4),
        sample_latents=True,
    ),
}
IMAGE_GENERATORS = {"flextok": lambda: FlexTokModeling(model=GPT)}


def noisy(shapes, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(scale=0.3, size=x.shape).astype(np.float32), unboxed(shapes))


@functools.cache
def noisy_params(task=TASK):
    """Parameters, none of them zero."""
    images = jax.ShapeDtypeStruct((1, *task.image_shape), np.float32)
    return noisy(jax.eval_shape(task.init, jax.random.key(0), {"images": images}))


@functools.partial(jax.jit, static_argnames=("config", "compact"))
def velocity(config, params, x, t, codes, keep=None, null=None, compact=False):
    arguments = (x, t, codes, keep, null)
    return FlexTok(config).apply({"params": params}, *arguments, compact=compact, method="velocity")[0]


@pytest.fixture(scope="module")
def inputs():
    """Parameters, noised latents, their times, and codes, of three images."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 8, 8, 3)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, CONFIG.scalars.size, (3, 8)))
    return noisy_params()["flextok"], x, jnp.array([0.2, 0.9, 1.0]), CONFIG.scalars.codes(ids)


def test_first_codes_are_those_of_fewer_registers():
    """Truncating the codes is encoding with fewer registers."""
    images = np.random.default_rng(0).random((3, 8, 8, 3), np.float32)
    params = noisy_params()
    codes = TASK.encode(params, images)
    assert len(np.unique(codes)) > 4
    for k in (1, 3):
        fewer = dataclasses.replace(TASK, model=dataclasses.replace(CONFIG, registers=k), dropout="uniform")
        cut = jax.tree.map(lambda x: x, params["flextok"])
        cut = {**cut, "encoder": {**cut["encoder"], "registers": cut["encoder"]["registers"][:k]}}
        chex.assert_trees_all_equal(fewer.encode({"flextok": cut}, images), codes[:, :k])


def test_what_is_dropped_does_not_matter(inputs):
    """Codes beyond those that are kept change nothing; all of them are the identity; none is the null condition."""
    params, x, t, codes = inputs
    other = CONFIG.scalars.codes(CONFIG.scalars.ids(codes) * 7 % CONFIG.scalars.size)
    keep, none = jnp.array([1, 4, 8]), jnp.zeros(3, bool)
    kept = jnp.where((jnp.arange(8) < keep[:, None])[..., None], codes, other)
    plain = velocity(CONFIG, params, x, t, codes, keep, none)
    chex.assert_trees_all_equal(plain, velocity(CONFIG, params, x, t, kept, keep, none))
    less = velocity(CONFIG, params, x, t, codes, keep - jnp.array([0, 1, 1]), none)
    assert (np.abs(plain - less).max((1, 2, 3)) > 1e-3).tolist() == [False, True, True]  # and the last one matters
    every = jnp.full(3, 8)
    whole = velocity(CONFIG, params, x, t, codes)
    chex.assert_trees_all_close(velocity(CONFIG, params, x, t, codes, every, none), whole, atol=1e-5)
    null = velocity(CONFIG, params, x, t, codes, keep, ~none)  # it wins over the mask token
    chex.assert_trees_all_equal(null, velocity(CONFIG, params, x, t, other, every, ~none))
    order = jnp.array([2, 0, 1])
    moved = velocity(CONFIG, params, x[order], t[order], codes[order], keep[order], none)
    chex.assert_trees_all_close(moved, plain[order], atol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_equal_tokens_can_be_computed_once(inputs, k):
    params, x, t, codes = inputs
    for null in (jnp.zeros(3, bool), jnp.array([True, False, True])):
        plain = velocity(CONFIG, params, x, t, codes, jnp.full(3, k), null)
        short = velocity(CONFIG, params, x, t, codes[:, :k], None, null, compact=True)
        chex.assert_trees_all_close(short, plain, atol=2e-5)
    with pytest.raises(ValueError, match="give all of them"):
        velocity(CONFIG, params, x, t, codes[:, :k])


def test_at_first_the_flow_stands_still():
    """The head begins at 0, so velocities are 0 and samples are the noise."""
    images = np.random.default_rng(0).random((2, 8, 8, 3), np.float32)
    params = unboxed(jax.jit(TASK.init)(jax.random.key(0), {"images": images}))
    codes = TASK.encode(params, images)
    rng = jax.random.key(1)
    drawn = TASK.decode(params, codes[:, :3], rng)
    chex.assert_trees_all_close(drawn, TASK.to_images(params, flextok._noise(TASK, rng, 2)), atol=1e-6)


def test_one_function_decodes_any_number_of_codes():
    params = noisy_params()
    rng, codes = jax.random.key(0), jnp.asarray(np.random.default_rng(0).integers(0, 200, (2, 8, 1)), jnp.int32)
    flextok._decode.clear_cache()
    each = [TASK.decode(params, codes[:, :k], rng) for k in range(1, 9)]
    assert flextok._decode._cache_size() == 1
    lists = TASK.decode_lists(params, [codes[0, :3, 0].tolist(), codes[1, :, 0].tolist()], rng)
    assert flextok._decode._cache_size() == 1
    chex.assert_trees_all_close(lists, jnp.stack([each[2][0], each[7][1]]), atol=1e-6)
    short = dataclasses.replace(TASK, sampling=dataclasses.replace(TASK.sampling, compact=True))
    chex.assert_trees_all_close(short.decode(params, codes[:, :3], rng), each[2], atol=1e-4)


def test_one_function_draws_any_number_of_tokens():
    task = FlexTokModeling(model=GPT)
    shapes = jax.eval_shape(
        lambda: FlexTokGPT(GPT).init(jax.random.key(0), jnp.zeros((1, 8, 1), jnp.int32), jnp.zeros(1, jnp.int32))
    )
    params, rng = noisy(shapes["params"]), jax.random.key(0)
    draw = functools.partial(task.draw, params, [0, 3, None], rng)
    whole = draw()
    engine = flextok_generation.Engine._run
    before = engine._cache_size()
    for k in (1, 3, 8):
        chex.assert_trees_all_equal(draw(sampling=FlexTokSampling(tokens=k)), whole[:, :k])
    assert engine._cache_size() == before
    with pytest.raises(ValueError, match="tokens is 9; an image has 8"):
        draw(sampling=FlexTokSampling(tokens=9))


def test_cached_is_recomputed():
    """The token that is drawn greedily is the likeliest one of all logits computed at once."""
    config = dataclasses.replace(GPT, num_classes=3)
    labels = jnp.array([0, 2])
    shapes = jax.eval_shape(
        lambda: FlexTokGPT(config).init(jax.random.key(0), jnp.zeros((1, 8, 1), jnp.int32), labels[:1])
    )
    params = noisy(shapes["params"])
    sampling = FlexTokSampling(temperature=0.0, guidance=2.0)
    codes = FlexTokModeling(model=config).draw(params, labels.tolist(), None, sampling=sampling)
    both = [FlexTokGPT(config).apply({"params": params}, codes, row) for row in (labels, jnp.full(2, 3))]
    logits = both[1] + 2 * (both[0] - both[1])
    chex.assert_trees_all_equal(codes, logits.argmax(-1).astype(jnp.int32))


def test_finite_scalars():
    scalars = FiniteScalars((8, 5, 4))
    ids = jnp.arange(scalars.size)
    codes = scalars.codes(ids)
    chex.assert_trees_all_equal(scalars.ids(codes), ids)
    assert (np.abs(codes) <= 1).all() and len(np.unique(codes, axis=0)) == scalars.size == 160
    z = jnp.asarray(np.random.default_rng(0).normal(size=(50, 3)), jnp.float32)
    gradient = jax.grad(lambda z: scalars.quantize(z).sum())(z)
    levels = np.array(scalars.levels)
    half = (levels - 1) * 1.001 / 2
    shift = np.arctanh(np.where(levels % 2, 0, 0.5) / half)
    np.testing.assert_allclose(gradient, (1 - np.tanh(z + shift) ** 2) * half / (levels // 2), rtol=1e-5)
    chex.assert_trees_all_equal(scalars.quantize(jnp.zeros(3)), jnp.zeros(3))
    loose = scalars.quantize(z, jnp.arange(50)[:, None] % 2 == 0)
    chex.assert_trees_all_equal(loose[::2], scalars.quantize(z)[::2])
    chex.assert_trees_all_equal(loose[1::2], (scalars.bound(z) / (levels // 2))[1::2])
    for levels in ((), (8, 1), (2**16, 2**16)):
        with pytest.raises(ValueError, match="levels is"):
            FiniteScalars(levels)


def test_corruption_replaces_as_many_as_it_says():
    scalars = FiniteScalars((8, 8, 8))
    codes = jnp.full((2000, 40, 3), 0.25)
    found = corrupted(codes, scalars, jax.random.key(0), share=(0.2, 0.6), probability=0.5)
    share = np.mean(np.any(found != 0.25, -1), -1)
    assert abs(np.mean(share > 0) - 0.5) < 0.05
    assert abs(share[share > 0].mean() - 0.4) < 0.02 and np.percentile(share[share > 0], 10) > 0.2
    chex.assert_trees_all_equal(scalars.codes(scalars.ids(found)), found)


def test_euler_is_exact_where_it_can_be():
    noise, goal = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 4, 1)), jnp.float32)
    for steps in (1, 3, 10):
        constant = euler(lambda x, t, guided: (goal, None), noise, steps)
        chex.assert_trees_all_close(constant, noise - goal, atol=1e-5)
        straight = euler(lambda x, t, guided: ((x - goal) / t[:, None, None, None], None), noise, steps)
        chex.assert_trees_all_close(straight, goal, atol=1e-5)
    cond, uncond = noise, goal
    chex.assert_trees_all_close(
        Guidance(apg=True, eta=1.0, threshold=0.0, momentum=None).combine(cond, uncond, 3.0, cond)[0],
        Guidance().combine(cond, uncond, 3.0, cond)[0],
        atol=1e-5,
    )
    chex.assert_trees_all_equal(Guidance(apg=True).combine(cond, uncond, 1.0, 0 * cond)[0], cond)
    nothing = Guidance(apg=True).combine(0 * cond, 0 * cond, 3.0, 0 * cond)[0]
    chex.assert_trees_all_equal(nothing, 0 * cond)  # no direction, and no NaN
    asked = []
    euler(lambda x, t, guided: (asked.append(guided), (x, None))[1], noise, 2, Guidance(scale=1.0, apg=True))
    assert asked == [False]


def test_repa():
    """The features after a block are drawn towards the teacher's, which does not move, by the mean cosine."""
    teacher = LinearViTConfig(
        image_size=8, patch_size=4, num_classes=3, num_layers=1, d_model=8, num_heads=2, mlp_dim=8
    )
    task = dataclasses.replace(TASK, repa=Repa(teacher=teacher, run="", weight=0.5, layer=0), probe_every=10**6)
    params = noisy_params(task)
    images = jnp.asarray(np.random.default_rng(0).random((3, 8, 8, 3)), jnp.float32)
    batch = {"images": images, "mask": jnp.array([1.0, 1.0, 0.0])}
    rng, step = jax.random.key(0), jnp.int32(5)
    (loss, metrics), gradient = jax.jit(jax.value_and_grad(task.loss, has_aux=True))(params, batch, rng, step)
    np.testing.assert_allclose(loss, metrics["velocity"] + 0.5 * metrics["repa"], rtol=1e-6)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient["frozen"]))
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(gradient["repa"]))

    @jax.jit
    def features(params):
        draws, x = task.draw(rng, 3), task.to_latents(params, images)
        model, given = FlexTok(CONFIG), {"params": params["flextok"]}
        codes = CONFIG.scalars.quantize(model.apply(given, x, method="vectors"))
        arguments = (noised(x, draws.noise, draws.t), draws.t, codes, draws.keep, draws.null)
        _, state = model.apply(given, *arguments, method="velocity", mutable="intermediates")
        hidden = state["intermediates"]["decoder"]["stack"]["blocks"]["hidden"][0][0][:, : CONFIG.patches]
        ours = Projection(CONFIG.decoder_width, 8, (4, 4), (2, 2)).apply({"params": params["repa"]}, hidden)
        return ours, task.repa.features(params["frozen"]["teacher"], images)

    ours, theirs = features(params)
    assert theirs.shape == ours.shape == (3, 4, 8)
    lengths = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
    cosine = np.sum(np.asarray(ours * theirs), -1) / lengths
    np.testing.assert_allclose(metrics["repa"], -cosine[:2].mean(), rtol=1e-4)
    with pytest.raises(ValueError, match=r"repa\.layer is 2, but the decoder has 2 blocks"):
        dataclasses.replace(task, repa=dataclasses.replace(task.repa, layer=2))


def test_draws_of_kept_codes():
    for dropout in ("pow2", "uniform", "uniform_pow2", "none"):
        kept = np.asarray(draw_kept(jax.random.key(0), 4000, 8, dropout))
        expected = {"uniform": list(range(1, 9)), "none": [8]}.get(dropout, [1, 2, 4, 8])
        assert np.unique(kept).tolist() == expected
        if dropout == "uniform_pow2":
            assert abs(np.mean(kept == 8) - 0.5) < 0.03
    odd = np.asarray(draw_kept(jax.random.key(0), 4000, 6, "uniform_pow2"))
    assert np.unique(odd).tolist() == [1, 2, 4, 6]


def test_what_is_refused():
    replace = functools.partial(dataclasses.replace, CONFIG)
    for make, message in (
        (lambda: replace(latent_size=(8, 9)), "patch is .* does not divide"),
        (lambda: replace(table=(3, 4)), "table is .* 4 x 4 patches"),
        (lambda: replace(head_dim=7), "head_dim is 7, which does not divide the width 16"),
        (lambda: replace(null="none"), "null is 'none'; it must be one of learned, zero"),
        (lambda: replace(levels=(8, 1)), "each must be 2 or more"),
        (lambda: FlexTokenizer(model=replace(registers=6)), "registers is 6, but dropout is pow2"),
        (lambda: FlexTokenizer(model=replace(channels=4)), "channels is 4; with latents = colour it must be 3"),
        (lambda: dataclasses.replace(TASK, eval_prefixes=(9,)), "an image has 1 to 8 codes"),
        (lambda: TASK.fit(ImageData(images="digits", size=9)), "data are 9 x 9 x 3, but the model's are 8 x 8 x 3"),
        (lambda: FlowSampling(steps=0), "steps is 0; it must be at least 1"),
        (lambda: Guidance(scale=float("nan")), "scale is nan"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    params, rng = noisy_params(), jax.random.key(0)
    codes = jnp.zeros((1, 8, 1), jnp.int32)
    for call, message in (
        (lambda: TASK.decode(params, codes[:, :0], rng), "positions, sub-codes"),
        (lambda: TASK.decode(params, jnp.zeros((1, 9, 1), jnp.int32), rng), "positions, sub-codes"),
        (lambda: TASK.decode(params, codes + 200, rng), r"must be in \[0, 200\)"),
        (lambda: TASK.decode(params, codes), "give decode a key"),
        (lambda: TASK.decode_lists(params, [[1], []], rng), "a list of 0 codes; each image must have 1 to 8"),
        (lambda: TASK.decode_lists(params, [[0] * 9], rng), "a list of 9 codes"),
        (lambda: TASK.decode_lists(params, [[3, 200]], rng), r"the code 200; it must be in \[0, 200\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# The authors' config, as Hydra builds objects from it.


def entry(kind, **options):
    return {"_target_": f"flextok.somewhere.{kind}", "read_key": "a", "write_key": "b", **options}


def authors(config: FlexTokConfig) -> dict:
    """The config of a model, in the form in which the released ones are."""
    norm = {"_target_": "flextok.norm.Fp32LayerNorm", "_partial_": True, "bias": False, "elementwise_affine": False}
    patch = {"patch_sizes": list(config.patch), "flatten_patches": False}
    trunk = {"head_dim": config.head_dim, "mlp_ratio": config.mlp_ratio, "norm_layer": norm, "qk_norm": True}
    table = {"max_sizes": list(config.grid), "posemb_type": "sincos", "posemb_scaling": "absolute"}
    head = {"use_mup_readout": False, "weight_init_style": "zero", "norm_layer": norm}
    encoder, decoder = {"dim": config.encoder_width}, {"dim": config.decoder_width}
    modulated = {"adaLN_emb_read_key": "temb"} if config.head_modulation else {}
    null = entry("LearnedNullCond", **decoder, dropout_prob=0.1)
    if config.null == "zero":
        null = entry("ZeroNullCond", dropout_prob=0.1)
    return {
        "encoder": {
            "_target_": "flextok.SequentialModuleDictWrapper",
            "module_dict": {
                "enc_channels_to_last": entry("PerSampleOp", per_sample_op={}),
                "enc_patch_emb": entry("PatchEmbedder", **patch, **encoder, channels_in=config.channels),
                "enc_posemb_module": entry("PositionalEmbeddingAdder", **encoder, **table),
                "enc_register_module": entry("Registers1D", **encoder, n_min=config.registers, n_max=config.registers),
                "enc_seq_packer": entry("BlockWiseSequencePacker", mask_mode="causal_last", pad_to_multiple=128),
                "enc_transformer": entry("FlexTransformer", **encoder, depth=config.encoder_depth, **trunk),
                "enc_unpacker": entry("SequenceUnpacker"),
                "enc_to_latents": entry("LinearHead", **encoder, dim_out=len(config.levels), **head),
            },
        },
        "decoder": {
            "_target_": "flextok.SequentialModuleDictWrapper",
            "module_dict": {
                "dec_from_latents": entry("LinearLayer", dim_in=len(config.levels), **decoder),
                "dec_registers_posemb_module": entry(
                    "PositionalEmbeddingAdder", **decoder, max_sizes=[config.registers], posemb_type="learnable_sum"
                ),
                "dec_nested_dropout": entry("MaskedNestedDropout", **decoder, size_sampling_mode="uniform"),
                "dec_latent_dropout": null,
                "dec_noise_channels_to_last": entry("PerSampleOp", per_sample_op={}),
                "dec_noise_patch_emb": entry("PatchEmbedder", **patch, **decoder, channels_in=config.channels),
                "dec_patches_posemb_module": entry("PositionalEmbeddingAdder", **decoder, **table),
                "dec_seq_packer": entry("BlockWiseSequencePacker", mask_mode="full", per_subseq_embs=True),
                "dec_time_embedder": entry(
                    "TimestepEmbedder", **decoder, frequency_embedding_size=config.time_channels, max_timestep=1.0
                ),
                "dec_transformer": entry(
                    "FlexTransformer",
                    **decoder,
                    depth=config.decoder_depth,
                    **trunk,
                    adaLN_emb_read_key="temb",
                    adaLN_expansion=config.modulation_sets,
                    intermediate_layers=[1],
                ),
                "dec_unpacker": entry("SequenceUnpacker"),
                "dec_repa_unpacker": entry("SequenceUnpacker"),
                "dec_to_patches": entry(
                    "ToPatchesLinearHead",
                    **decoder,
                    channels_out=config.channels,
                    patch_sizes=list(config.patch),
                    **head,
                    **modulated,
                ),
                "dec_patches_to_first": entry("PerSampleOp", per_sample_op={}),
            },
        },
        "regularizer": entry("FSQ", levels=list(config.levels), drop_quant_p=0.25, packed_call=True),
    }


VARIANTS = {
    "plain": CONFIG,
    "zero null": dataclasses.replace(CONFIG, null="zero", head_modulation=True),
    "oblong": dataclasses.replace(
        CONFIG, latent_size=(4, 12), patch=(1, 3), modulation_sets=1, levels=(3, 3), mlp_ratio=2.5, encoder_depth=1
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_released_files_are_read_by_their_config(name, tmp_path):
    """Config and tensors to a model and back, bit for bit."""
    config = VARIANTS[name]
    found, options = interop.config_from({"config": authors(config)})
    assert found == config
    assert options["dropout"] == "uniform" and options["null_probability"] == 0.1 and options["drop_rounding"] == 0.25
    params = noisy_params(dataclasses.replace(TASK, model=config))["flextok"]
    tensors = interop.params_to(config, params)
    chex.assert_trees_all_equal(interop.params_from(config, tensors | {"vae.vae.encoder.conv_in.bias": 0}), params)
    some = next(iter(tensors))
    for wrong, message in (
        ({k: v for k, v in tensors.items() if k != some}, f"{some} is missing"),
        (tensors | {"decoder.module_dict.other.weight": tensors[some]}, "decoder.module_dict.other.weight is unknown"),
        (
            tensors | {"encoder.module_dict.enc_posemb_module.posembs": np.zeros((1, 16, *config.grid), np.float32)},
            "enc_posemb_module.posembs is not the table",
        ),
    ):
        with pytest.raises(ValueError, match=message.replace(".", r"\.")):
            interop.params_from(config, wrong)


def changed(config, tower, module, **options):
    """The config with options of a module changed; None takes the module out."""
    modules = dict(config[tower]["module_dict"])
    modules[module] = {**modules.get(module, {}), **options}
    return {**config, tower: {**config[tower], "module_dict": modules}}


def test_what_is_unknown_in_a_config_is_named():
    good = authors(CONFIG)
    for wrong, message in (
        ({}, "no encoder.module_dict"),
        (changed(good, "decoder", "dec_magic", **entry("Magic")), "decoder.dec_magic (Magic), which is not known"),
        (changed(good, "decoder", "dec_latent_dropout", _target_="x.Other"), "dec_latent_dropout of the class Other"),
        (changed(good, "encoder", "enc_transformer", qkv_bias=True), "qkv_bias = True; only False is known"),
        (changed(good, "encoder", "enc_transformer", window=3), "the option window = 3"),
        (changed(good, "encoder", "enc_register_module", ordering_mode="avg_pool"), "ordering_mode = 'avg_pool'"),
        (changed(good, "encoder", "enc_register_module", n_min=1), "enc_register_module drops registers"),
        (changed(good, "encoder", "enc_seq_packer", mask_mode="causal"), "mask_mode = 'causal'"),
        (changed(good, "decoder", "dec_to_patches", use_mup_readout=True), "use_mup_readout = True"),
        (changed(good, "decoder", "dec_patches_posemb_module", posemb_type="learnable_sum"), "posemb_type"),
        ({**good, "regularizer": entry("VQ")}, "the regularizer VQ; only FSQ"),
    ):
        with pytest.raises(ValueError) as error:
            interop.config_from(wrong)
        assert message in str(error.value), error.value


def test_the_vae_of_a_config():
    """Its sizes and its scale; a config that does not say the scale is refused."""
    model = flextok.PUBLISHED["flextok-d12-d12"]
    vae = entry("StableDiffusionVAE", latent_channels=16, scaling_factor=0.7, hf_hub_path="x/vae", frozen=True)
    options = interop.latents_of({"vae": vae}, model)
    assert options["sample_latents"] and options["latents"] == "vae"
    assert options["vae"].scaling == 0.7 and (options["vae"].image_size, options["vae"].z_channels) == (256, 16)
    assert FlexTokenizer(model=model, **options).image_shape == (256, 256, 3)
    for wrong, message in (
        (
            {**vae, "scaling_factor": None},
            "the config of vae has no scaling_factor (it is in the config.json of x/vae)",
        ),
        ({**vae, "latent_channels": 4}, "latent_channels = 4"),
        (entry("VQModel"), "the vae VQModel; only StableDiffusionVAE"),
        (None, "the config has no vae"),
    ):
        with pytest.raises(ValueError) as error:
            interop.latents_of({"vae": wrong}, model)
        assert message in str(error.value), error.value


@pytest.mark.parametrize("name", flextok.PUBLISHED)
def test_published_sizes(name):
    """The counts of the authors' modules, in millions: the trunks' without and with modulation."""
    encoder, decoder, modulated = {
        "flextok-d12-d12": (84.9, 84.9, 170),
        "flextok-d18-d18": (286.7, 286.7, 573),
        "flextok-d18-d28": (286.7, 1079, 2157),
    }[name]
    config = flextok.PUBLISHED[name]
    latents = jax.ShapeDtypeStruct((1, *config.latent_size, config.channels), np.float32)
    shapes = jax.eval_shape(FlexTok(config).init, jax.random.key(0), latents, jax.ShapeDtypeStruct((1,), np.float32))

    def size(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6

    params = unboxed(shapes["params"])
    blocks = params["decoder"]["stack"]["blocks"]
    assert abs(size(params["encoder"]["stack"]) - encoder) < 0.06
    assert abs(size({k: v for k, v in blocks.items() if k != "modulation"}) / decoder - 1) < 1e-3
    assert abs(size(blocks) / modulated - 1) < 4e-3
    assert config.decoder_stack.mlp_dim == {768: 2048, 1152: 3072, 1792: 4778}[config.decoder_width]


@pytest.mark.parametrize("name", flextok_generation.PUBLISHED)
def test_published_generators(name):
    """12 width^2 parameters a layer."""
    config = flextok_generation.PUBLISHED[name]
    blocks = config.num_layers * config.projection_params() / 1e6
    number = name.rpartition("-")[2]
    assert abs(blocks / (1e3 * float(number[:-1]) if number.endswith("b") else float(number[:-1])) - 1) < 0.02
