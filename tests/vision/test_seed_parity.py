"""SEED and its bricks, against numbers made by the authors' code."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.interop.seed import block_names, from_official, names_of, qformer_names, to_official, vision_names
from jaxtok.interop.tensors import read_params, shapes_of, write_params
from jaxtok.nn.linear import ViTStack
from jaxtok.nn.losses import cross_entropy
from jaxtok.nn.quantizers import CodebookAverages, NearestQuantizer, assigned_sums
from jaxtok.nn.transformer import Stack
from jaxtok.protocols import FROZEN
from jaxtok.vision.eva_vit import EvaViT, EvaViTConfig
from jaxtok.vision.qformer import QFormer, QFormerConfig, attention_bias
from jaxtok.vision.seed import Seed, SeedConfig
from jaxtok.vision.seed_alignment import SeedAlignment


def nhwc(x):
    return np.asarray(x).transpose(0, 2, 3, 1)


def gradients(parity, what, ours, theirs):
    """Gradients, some of which are 0 but for rounding (of key biases; of the query and key of a single token)."""
    single = "Reverse_Qformer.bert.encoder.layer.0.attention.self."
    zero = [n for n in theirs if n.endswith("key.bias") or n.startswith((f"{single}query", f"{single}key"))]
    if not any(name.startswith("Reverse_Qformer") for name in theirs):
        zero = [name for name in zero if name.endswith("key.bias")]
    for name in zero:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5)
    rest = [name for name in theirs if name not in zero]
    parity(what, {n: np.asarray(ours[n]) for n in rest}, {n: theirs[n] for n in rest}, 1e-4)


def qformer_config(c, **fields) -> QFormerConfig:
    sizes = {"num_layers": c["layers"], "d_model": c["hidden"], "num_heads": c["heads"], "mlp_dim": c["inter"]}
    more = {"vocab_size": c["vocab"], "max_positions": c["max_pos"], "cross_every": c["freq"]}
    queries = {"num_queries": c["num_query"], "causal": c["num_query"] == 32}
    still = {"dropout": 0.0, "attention_dropout": 0.0}
    return QFormerConfig(**sizes | more | queries | still | fields)


def seed_config(c, **fields) -> SeedConfig:
    ratio = {"mlp_dim": int(c["vit_dim"] * c["vit_mlp_ratio"]), "d_model": c["vit_dim"]}
    sizes = {"image_size": c["img"], "patch_size": c["vit_patch"], "num_layers": c["vit_depth"]}
    vision = EvaViTConfig(**sizes, **ratio, num_heads=c["vit_heads"])
    plain = {"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3}  # the fixtures' images are normalised already
    return SeedConfig(vision=vision, qformer=qformer_config(c, context_width=c["vit_dim"]), **plain, **fields)


@pytest.mark.parity("visual_bricks/eva_vit*.npz")
def test_eva_vit(golden, parity):
    c = golden.config
    config = EvaViTConfig(
        image_size=c["img_size"],
        patch_size=c["patch_size"],
        d_model=c["embed_dim"],
        num_layers=c["depth"],
        num_heads=c["num_heads"],
        mlp_dim=int(c["embed_dim"] * c["mlp_ratio"]),
        norm_eps=c["eps"],
    )
    model, images = EvaViT(config), nhwc(golden["in/image"])
    shapes = shapes_of(lambda: model.init(jax.random.key(0), images)["params"])
    params = read_params(vision_names(), shapes, golden.under("params"))
    out, sown = jax.jit(lambda p, x: model.apply({"params": p}, x, mutable="intermediates"))(params, images)
    parity("features", out, golden["out/features"], 2e-5)
    (hidden,) = sown["intermediates"]["stack"]["blocks"]["hidden"]
    for name, value in golden.under("mid").items():
        parity(name, hidden[int(name.removeprefix("after_block"))], value, 2e-5)
    back = write_params(vision_names(), params)
    assert set(back) == set(golden.under("params"))
    assert all(np.array_equal(back[name], value) for name, value in golden.under("params").items())


@pytest.mark.parity("visual_bricks/adaln_blocks_dit_order*.npz")
def test_vit_block(golden, parity):
    c = golden.config
    theirs = {f"b.0.{k}": v for k, v in golden.under("params/vit_block").items()} or {
        "b.0." + k.removeprefix("vit_block."): v
        for k, v in golden.under("params").items()
        if k.startswith("vit_block.")
    }
    if not theirs:
        pytest.skip("the file has no vit_block")
    width = theirs["b.0.mlp.fc1.bias"].shape[0]
    config = ViTStack(num_layers=1, d_model=c["dim"], num_heads=c["heads"], mlp_dim=width, norm_eps=c["eps"])
    module = Stack(config)
    x = golden["in/x"]
    names = block_names((), "b")
    params = read_params(names, shapes_of(lambda: module.init(jax.random.key(0), x, None)["params"]), theirs)
    parity("vit_block", module.apply({"params": params}, x, None)[0], golden["out/vit_block"], 2e-5)


@pytest.mark.parity("visual_bricks/vq*.npz")
def test_nearest_quantizer(golden, parity):
    c, table = golden.config, golden["params/embedding.weight"]
    for kind in ("legacy", "fixed"):
        module = NearestQuantizer(c["n_e"], c["e_dim"], c["beta"], legacy=kind == "legacy")

        def objective(table, z, module=module):
            found = module.apply({"params": {"embedding": table}}, z)
            return jnp.sum(found.vectors * golden["in/cotangent"]) + 3 * found.loss.mean(), found

        (_, found), grads = jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True))(table, golden["in/z"])
        assert np.array_equal(found.codes.reshape(-1), golden[f"out/{kind}/indices"])
        parity(f"{kind} z_q", found.vectors, golden[f"out/{kind}/zq"], 2e-5)
        parity(f"{kind} loss", found.loss.mean(), golden[f"out/{kind}/loss"], 1e-5)
        ours = {"embedding.weight": grads[0], "z": grads[1]}
        parity(f"{kind} gradients", ours, golden.under(f"grad/{kind}"), 1e-4)
    ids = golden["out/legacy/indices"][:, None]
    entries = module.apply({"params": {"embedding": table}}, ids, method="embed")
    parity("entries", entries, golden["out/codebook_entry"], 1e-6)
    averages = CodebookAverages.init(table, 0.0)

    @jax.jit
    def updated(averages, table, z):
        codes = module.apply({"params": {"embedding": table}}, z[None]).codes[0]
        averages = averages.update(*assigned_sums(z, codes, c["n_e"]), decay=c["ema_decay"])
        return averages, averages.table(c["ema_eps"]), codes

    for step in range(3):
        averages, table, codes = updated(averages, table, golden[f"in/ema/z{step}"])
        assert np.array_equal(codes[:, 0], golden[f"out/ema/indices{step}"])
        theirs = golden[f"out/ema/weight{step}"]
        parity(f"counts {step}", averages.counts, golden[f"out/ema/cluster_size{step}"], 1e-5)
        for ours_row, row in zip(np.asarray(table), theirs):
            np.testing.assert_allclose(ours_row, row, atol=1e-5 * np.abs(row).max())


@pytest.mark.parity("seed/causal_qformer*.npz")
def test_qformer(golden, parity):
    c = golden.config
    config = qformer_config(c, context_width=c["enc_width"])
    model = QFormer(config)
    image, image_mask = golden["in/encoder_hidden_states"], golden["in/encoder_attention_mask"] > 0
    tokens, mask = golden["in/text_ids"], golden["in/text_attention_mask"]
    names = qformer_names(config, ())
    shapes = shapes_of(lambda: model.init(jax.random.key(0), image, tokens, method="all_parts")["params"])
    params = read_params(names, shapes, golden.under("params"))

    assert np.array_equal(attention_bias(c["num_query"], causal=config.causal), golden["mid/mask_query_only"])
    assert np.array_equal(attention_bias(0, mask), golden["mid/mask_text_only"])
    assert np.array_equal(attention_bias(c["num_query"], mask, causal=config.causal), golden["mid/mask_query_text"])
    assert np.array_equal(attention_bias(0, mask, c["num_query"]), golden["mid/mask_decoder"])

    @jax.jit
    def run(params):
        def apply(*args, **options):
            return model.apply({"params": params}, *args, **options)

        def objective(params):
            h, past = model.apply({"params": params}, image, image_mask=image_mask, keep=True)
            x, _ = model.apply({"params": params}, None, golden["in/decoder_ids"], mask, past=past)
            logits = model.apply({"params": params}, x, method="logits")
            labels = golden["in/labels"]
            counted = labels[:, 1:] >= 0
            nats = cross_entropy(logits[:, :-1], jnp.maximum(labels[:, 1:], 0), c["label_smoothing"])
            lm_loss = jnp.sum(nats * counted) / counted.sum()
            return lm_loss + jnp.sum(h * golden["in/cotangent"]), (h, logits, lm_loss)

        (value, (h, logits, lm_loss)), grads = jax.value_and_grad(objective, has_aux=True)(params)
        text, _ = apply(None, tokens, mask)
        both, _ = apply(image, tokens, mask, image_mask=image_mask)
        caption = apply(image, golden["in/decoder_ids"], mask, image_mask=image_mask, method="caption")
        return value, h, logits, lm_loss, grads, text, both, caption

    value, h, logits, lm_loss, grads, text, both, caption = run(params)
    parity("queries", h, golden["out/query_only"], 2e-5)
    parity("text", text, golden["out/text_only"], 2e-5)
    parity("both", both, golden["out/query_text"], 2e-5)
    parity("caption logits", logits, golden["out/decoder_logits"], 2e-5)
    parity("caption logits at once", caption, golden["out/decoder_logits"], 2e-5)
    parity("caption loss", lm_loss, golden["out/lm_loss"], 1e-5)
    parity("objective", value, golden["out/objective"], 1e-5)
    gradients(parity, "gradients", write_params(names, grads), golden.under("grad"))
    back = write_params(names, params)
    assert set(back) == set(golden.under("params"))
    assert all(np.array_equal(back[name], value) for name, value in golden.under("params").items())


def returns(task, params, golden):
    """Whether the tensors come back bit for bit."""
    back = to_official(task, params)
    assert set(back) == set(golden.under("params"))
    assert all(np.array_equal(back[name], value) for name, value in golden.under("params").items())


@pytest.mark.parity("seed/stage1_contrastive*.npz")
def test_alignment(golden, parity):
    c = golden.config
    task = SeedAlignment(model=seed_config(c, projection_dim=c["embed_dim"]), smoothing=c["label_smoothing"])
    params = jax.tree.map(jnp.asarray, from_official(task, golden.under("params")))
    returns(task, params, golden)
    tokens = golden["in/text_ids"]
    batch = {
        "images": nhwc(golden["in/image"]),
        "tokens": tokens,
        "text_mask": (tokens != 0).astype(np.float32),
        "mask": np.ones(len(tokens), np.float32),
    }

    @jax.jit
    def run(params):
        (loss, _), grads = jax.value_and_grad(task.loss, has_aux=True)(
            params, batch, jax.random.key(0), jnp.zeros((), jnp.int32)
        )
        v, t = task.vectors(params, *(batch[name] for name in ("images", "tokens", "text_mask")))
        seen = task.model.vision.module().apply({"params": params[FROZEN]["vision"]}, batch["images"])
        caption = dataclasses.replace(task, captioning=True)._caption_loss(params, batch, None)
        return loss, grads, v, t, seen, caption

    loss, grads, v, t, seen, caption = run(params)
    parity("vit", seen, golden["mid/vit_out"], 2e-5)
    parity("image vectors", v, golden["mid/image_feat_last_query"], 2e-5)
    parity("text vectors", t, golden["mid/text_feat"], 2e-5)
    parity("similarities", v @ t.T / params["aligner"]["temperature"], golden["mid/sim_i2t"], 2e-5)
    parity("loss", loss, golden["out/loss_itc"], 1e-5)
    parity("caption loss", caption, golden["out/loss_lm_optional"], 1e-5)
    gradients(parity, "gradients", write_params(names_of(task), grads), golden.under("grad"))


def stage_two(c, **fields) -> Seed:
    released = "use_qformer_image" in c  # the inference package
    head = "mlp" if released and not c["use_qformer_image"] else "qformer"
    config = seed_config(
        c,
        head=head,
        codebook_size=c["n_embed"],
        code_dim=c.get("code_dim", c.get("codebook_dim")),
        depth=c.get("decode_depth", 4),
        block_heads=c["block_heads"],
        feature_dim=c.get("feat_dim", c.get("image_features_dim")),
        reverse_layers=c["layers"] if released else c["reverse_layers"],
        **fields,
    )
    config = dataclasses.replace(config, qformer=config.qformer.without_text())
    return Seed(model=config)


@pytest.mark.parity("seed/stage2_codebook*.npz")
def test_codebook_training(golden, parity):
    c, w = golden.config, golden.config["loss_weights"]
    task = stage_two(c, beta=c["beta"], legacy=c["legacy_vq"])
    task = dataclasses.replace(
        task, code_weight=w["embed"], semantic_weight=w["recon_s"], generation_weight=w["distill_image"]
    )
    params = jax.tree.map(jnp.asarray, from_official(task, golden.under("params")))
    returns(task, params, golden)
    images = nhwc(golden["in/image"])
    batch = {"images": images, "targets": golden["in/clip_image_embeds"], "mask": np.ones(len(images), np.float32)}

    @jax.jit
    def run(params, images):
        (loss, metrics), grads = jax.value_and_grad(task.loss, has_aux=True)(
            params, batch, jax.random.key(0), jnp.zeros((), jnp.int32)
        )
        states = task._states_of(params, batch)
        z, quantized = task.codes().apply({"params": params["codes"]}, states, method="quantize")
        u = task.codes().apply({"params": params["codes"]}, quantized.vectors, method="lift")
        codes = task.encode(params, images)
        return loss, metrics, grads, states, z, quantized, u, codes, task.decode_to_embedding(params, codes)

    loss, metrics, grads, states, z, quantized, u, codes, embedding = run(params, images)
    parity("causal embeddings", states, golden["mid/causal_embeddings"], 2e-5)
    parity("before quantisation", z, golden["mid/pre_vq"], 2e-5)
    assert np.array_equal(quantized.codes[..., 0], golden["out/indices"])
    parity("quantised", quantized.vectors, golden["mid/quant"], 2e-5)
    parity("decoded", u, golden["mid/decoded"], 2e-5)
    parity("loss", loss, golden["out/loss"], 1e-5)
    parity("code loss", task.code_weight * metrics["code_loss"], golden["out/loss_embed"], 1e-5)
    parity("semantic loss", task.semantic_weight * metrics["semantic"], golden["out/loss_recon_s"], 1e-5)
    parity("image loss", task.generation_weight * metrics["generation"], golden["out/loss_distill_image"], 1e-5)
    assert np.array_equal(codes[..., 0], golden["out/indices"])
    parity("embedding", embedding, golden["out/generation_embedding"], 1e-4)
    assert all(not np.any(g) for g in jax.tree.leaves(grads[FROZEN]))
    gradients(parity, "gradients", to_official(task, grads), golden.under("grad"))


@pytest.mark.parity("seed/tokenizer_*.npz")
def test_tokenizer(golden, parity):
    task = stage_two(golden.config)
    params = jax.tree.map(jnp.asarray, from_official(task, golden.under("params")))
    returns(task, params, golden)
    images = nhwc(golden["in/image"])

    @jax.jit
    def run(params, images, ids):
        apply = functools.partial(task.codes().apply, {"params": params["codes"]})
        seen = task.model.vision.module().apply({"params": params[FROZEN]["vision"]}, images)
        states = task.causal_embeddings(params, images)
        z, quantized = apply(states, method="quantize")
        codes = task.encode(params, images)
        both = task.decode_to_embedding(params, jnp.concatenate([codes, ids]))
        return seen, states, z, apply(quantized.vectors, method="lift"), codes, both

    seen, states, z, u, codes, both = run(params, images, golden["in/random_ids"][..., None])
    parity("vit", seen, golden["mid/vit_out"], 2e-5)
    parity("causal embeddings", states, golden["mid/causal_embeddings"], 2e-5)
    parity("before quantisation", z, golden["mid/pre_vq"], 2e-5)
    parity("decoded", u, golden["mid/decode_task_out"], 2e-5)
    assert np.array_equal(codes[..., 0], golden["out/indices"])
    parity("embedding", both[: len(codes)], golden["out/generation_embedding"], 1e-4)
    parity("embedding of random ids", both[len(codes) :], golden["out/generation_embedding_random_ids"], 1e-4)
