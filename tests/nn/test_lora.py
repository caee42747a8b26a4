"""LoRA: what is exact about differences of low rank."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.nn.lora import LoraConfig, find_sites, init_adapter, merge, saved_paths

RNG = np.random.default_rng(0)
PARAMS = {
    "embedding": RNG.normal(size=(11, 6)),
    "head_matrix": RNG.normal(size=(11, 6)),
    "stack": {
        "query": {"kernel": RNG.normal(size=(3, 6, 8)), "bias": RNG.normal(size=(3, 8))},
        "key": {"kernel": RNG.normal(size=(3, 6, 4))},
    },
    "head": {"kernel": RNG.normal(size=(6, 5))},
}
PARAMS = jax.tree.map(lambda x: x.astype(np.float32), PARAMS)
CONFIGS = {
    "every projection": LoraConfig(rank=2, alpha=3.0),
    "joint": LoraConfig(rank=3, targets=(), joint=(r"stack/(query|key)/kernel",), rank_stabilized=True),
    "tables": LoraConfig(targets=("embedding", "head_matrix"), ranks=(("embedding", 4),), alphas=(("emb.*", 1.0),)),
}


def made(config, noise=True, seed=0):
    """Sites and an adapter, none of whose entries is zero."""
    sites = find_sites(config, PARAMS)
    adapter = init_adapter(jax.random.key(seed), sites, saved_paths(config, PARAMS), PARAMS)
    if noise:
        flat, back = jax.flatten_util.ravel_pytree(adapter)
        adapter = back(jax.random.normal(jax.random.key(seed + 1), flat.shape))
    return sites, adapter


def close(ours, theirs, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), ours, theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_new_adapter_changes_nothing(name):
    sites, adapter = made(CONFIGS[name], noise=False)
    jax.tree.map(np.testing.assert_array_equal, merge(PARAMS, sites, adapter), PARAMS)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(adapter))  # and it can learn, as one of the two is not zero


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_then_unmerged_is_restored(name):
    sites, adapter = made(CONFIGS[name])
    merged = merge(PARAMS, sites, adapter)
    assert any(np.abs(a - b).max() > 0.1 for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(PARAMS)))
    close(merge(merged, sites, adapter, weight=-1.0), PARAMS, atol=1e-5)


def test_merged_is_the_branch():
    """x (W + s U V) = x W + s (x U) V, in each layer; V's columns are those of the joint matrices in their order."""
    sites, adapter = made(CONFIGS["joint"])
    merged = merge(PARAMS, sites, adapter)
    pair, x = adapter["pairs"]["stack/query/kernel+stack/key/kernel"], RNG.normal(size=(5, 6)).astype(np.float32)
    assert pair["in"].shape == (3, 6, 3) and pair["out"].shape == (3, 3, 12)
    for layer in range(3):
        branch = 16 / 3**0.5 * (x @ pair["in"][layer]) @ pair["out"][layer]
        for name, part in (("query", branch[:, :8]), ("key", branch[:, 8:])):
            plain = x @ PARAMS["stack"][name]["kernel"][layer]
            np.testing.assert_allclose(x @ merged["stack"][name]["kernel"][layer], plain + part, rtol=1e-4, atol=1e-4)


def test_tables():
    """A row of the embedding gets s A^T[row] B^T; a head's difference is s B A, with A drawn and B zero."""
    sites, adapter = made(CONFIGS["tables"])
    merged = merge(PARAMS, sites, adapter)
    pair = adapter["pairs"]["embedding"]
    row = PARAMS["embedding"][7] + 1.0 / 4 * pair["in"][7] @ pair["out"]
    np.testing.assert_allclose(merged["embedding"][7], row, atol=1e-5)
    _, new = made(CONFIGS["tables"], noise=False)
    assert not np.any(new["pairs"]["embedding"]["in"]) and not np.any(new["pairs"]["head_matrix"]["in"])
    assert 0 < np.abs(new["pairs"]["head_matrix"]["out"]).max() <= 6**-0.5


def test_several_adapters():
    """They add up in any order, with weights; what one of them saved is taken as it is."""
    config = dataclasses.replace(CONFIGS["every projection"], saved=("stack/query/bias",))
    (sites, first), (others, second) = made(CONFIGS["joint"]), made(config, seed=5)
    one = merge(merge(PARAMS, sites, first, weight=0.5), others, second)
    other = merge(merge(PARAMS, others, second), sites, first, weight=0.5)
    close(one, other, atol=1e-5)
    np.testing.assert_array_equal(one["stack"]["query"]["bias"], second["saved"]["stack"]["query"]["bias"])


def test_dropout_is_of_input_channels():
    """Some rows of U are left out, the others grow; on average nothing changes."""
    sites, adapter = made(CONFIGS["every projection"])
    plain = merge(PARAMS, sites, adapter)["head"]["kernel"] - PARAMS["head"]["kernel"]

    @jax.jit
    def dropped(key):
        return merge(PARAMS, sites, adapter, dropout=0.5, rng=key)["head"]["kernel"] - PARAMS["head"]["kernel"]

    one = dropped(jax.random.key(0))
    kept = np.abs(one).max(1) > 1e-6
    assert 0 < kept.sum() < 6
    np.testing.assert_allclose(one[kept], 2 * plain[kept], atol=1e-5)
    mean = jax.vmap(dropped)(jax.random.split(jax.random.key(1), 2000)).mean(0)
    np.testing.assert_allclose(mean, plain, atol=0.1 * np.abs(plain).max())


def test_what_cannot_be():
    sites, adapter = made(CONFIGS["every projection"])
    wide = PARAMS | {"head": {"kernel": jnp.zeros((7, 5))}}
    with pytest.raises(
        ValueError, match=r"'in' of head/kernel has shape \(6, 2\); for this model it must have \(7, 2\)"
    ):
        merge(wide, sites, adapter)
    with pytest.raises(ValueError, match="for head/kernel, which the model does not have"):
        merge({name: part for name, part in PARAMS.items() if name != "head"}, sites, adapter)
    with pytest.raises(ValueError, match=r"saved head/kernel of shape \(2,\), but the model has \(6, 5\)"):
        merge(PARAMS, (), {"pairs": {}, "saved": {"head": {"kernel": jnp.zeros(2)}}})
    with pytest.raises(ValueError, match=r"lora\.targets has 'middle', which is no parameter"):
        find_sites(LoraConfig(targets=("middle",)), PARAMS)
    with pytest.raises(ValueError, match=r"lora\.joint has 'middle', which is no parameter"):
        find_sites(LoraConfig(joint=("middle",)), PARAMS)
    with pytest.raises(ValueError, match=r"stack/query/bias of shape \(3, 8\), which is no projection"):
        find_sites(LoraConfig(targets=(".*",)), PARAMS)
    with pytest.raises(ValueError, match=r"lora\.saved has 'middle'"):
        saved_paths(LoraConfig(saved=("middle",)), PARAMS)
    with pytest.raises(ValueError, match=r"lora\.rank is 0"):
        LoraConfig(rank=0)
    with pytest.raises(ValueError, match=r"lora\.dropout is 1"):
        LoraConfig(dropout=1.0)
    with pytest.raises(ValueError, match=r"lora\.targets, joint and saved are empty"):
        LoraConfig(targets=())
