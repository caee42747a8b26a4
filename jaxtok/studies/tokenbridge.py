"""TokenBridge in small: what quantisation costs, what its input's size should be, and what the heads give.

Patches of scikit-learn's two photos, projected on 16 whitened principal components, stand for the latents of a VAE
where one that was trained on many photos is not at hand.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
from jaxtyping import Float

from jaxtok.data.codes import Header, write_codes
from jaxtok.data.images import ImageData
from jaxtok.studies.comparison import Comparison, markdown, print_table
from jaxtok.training.mesh import unboxed
from jaxtok.verbs.vision import generate, open_tokenizer, reconstruct, tokenize
from jaxtok.vision.images import as_float
from jaxtok.vision.tokenbridge import TokenBridgeConfig
from jaxtok.vision.tokenbridge_heads import ChannelHead, DiffusionHead, denoise, draw_channels
from jaxtok.vision.tokenbridge_tokenizer import DimensionwiseQuantizer

Row = dict[str, str]


def photo_patches(stride: int, side: int = 8, columns: tuple[int, int] = (0, 640)) -> Float[np.ndarray, "patches 192"]:
    """Patches of both photos, with pixels in [0, 1], that lie within these columns."""
    from sklearn.datasets import load_sample_images

    found = []
    for photo in load_sample_images().images:
        windows = np.lib.stride_tricks.sliding_window_view(photo[:, slice(*columns)] / 255, (side, side), (0, 1))
        found.append(windows[::stride, ::stride].transpose(0, 1, 3, 4, 2).reshape(-1, side * side * 3))
    return np.concatenate(found)


@dataclasses.dataclass(frozen=True)
class Whitening:
    """Principal components, each with its standard deviation taken out."""

    mean: Float[np.ndarray, " values"]
    components: Float[np.ndarray, "values channels"]
    """Scaled by the standard deviations."""

    @classmethod
    def of(cls, patches: Float[np.ndarray, "patches values"], channels: int = 16) -> Whitening:
        mean = patches.mean(0)
        powers, vectors = np.linalg.eigh(np.cov((patches - mean).T))
        return cls(mean, vectors[:, ::-1][:, :channels] * np.sqrt(powers[::-1][:channels]))

    def encode(self, patches: Float[np.ndarray, "patches values"]) -> Float[np.ndarray, "patches channels"]:
        scales = np.square(self.components).sum(0)
        return ((patches - self.mean) @ self.components / scales).astype(np.float32)

    def decode(self, latents: Float[np.ndarray, "patches channels"]) -> Float[np.ndarray, "patches values"]:
        return latents @ self.components.T + self.mean


def quantized(x: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """What is left of numbers after quantisation, and their codes."""
    quantizer = DimensionwiseQuantizer(**options)
    codes = np.asarray(quantizer.quantize(jnp.asarray(x, jnp.float32)))
    return quantizer.points[codes], codes


def entropy(codes: np.ndarray, levels: int) -> float:
    """Of the codes, in bits."""
    shares = np.bincount(codes.reshape(-1), minlength=levels) / codes.size
    return float(-np.sum(shares * np.log2(np.where(shares > 0, shares, 1))))


def quantization_curve(levels: Sequence[int], ranges: Sequence[float]) -> list[Row]:
    """The squared error of photo patches, divided by that of the principal components alone, and of their latents."""
    patches = photo_patches(8)
    whitening = Whitening.of(patches)
    latents = whitening.encode(patches)
    plain = np.square(whitening.decode(latents) - patches).mean()
    rows = []
    for reach in ranges:
        for count in levels:
            row = {"range": f"±{reach:g}", "levels": str(count)}
            for kind in ("gaussian", "linear"):
                made, _ = quantized(latents, levels=count, low=-reach, high=reach, kind=kind)
                error = np.square(whitening.decode(made) - patches).mean() / plain
                row |= {
                    f"{kind}: images": f"{error:.2f}",
                    f"{kind}: latents": f"{np.square(made - latents).mean():.3g}",
                }
            rows.append(row)
    return rows


def size_table(sources: dict[str, np.ndarray], sizes: Sequence[float], **options: Any) -> list[Row]:
    """How the quantiser's error and the entropy of its codes depend on the standard deviation of its input.

    Args:
      sources: latents by name; each is scaled to these standard deviations.
      options: of the quantiser.
    """
    quantizer = DimensionwiseQuantizer(**options)
    best = quantizer.high / quantizer.reach / np.sqrt(3)
    rows = []
    for size in sizes:
        row = {"std of the input": f"{size:.2f}", "of the best for a normal one": f"{size / best:.2f}"}
        for name, latents in sources.items():
            scaled = latents / latents.std() * size
            made, codes = quantized(scaled, **options)
            row[f"{name}: error"] = f"{np.square((made - scaled) / size).mean():.2e}"
            row[f"{name}: bits"] = f"{entropy(codes, quantizer.levels):.2f}"
        rows.append(row)
    return rows


def seconds_of(function: Callable[[], Any], repeats: int = 5) -> float:
    """The least time of a call, after one that compiles."""
    jax.block_until_ready(function())
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        found.append(time.perf_counter() - start)
    return min(found)


def head_speeds(
    config: TokenBridgeConfig, rows: Sequence[int], steps: int, diffusion_layers: Sequence[int]
) -> list[Row]:
    """How fast the heads draw a position, in one run. Guidance is on the features here, so that it costs neither head
    anything; MAR's own guidance, inside of its head, doubles the rows of it ("guided")."""
    z = jnp.zeros((1, config.decoder_width))
    found = []
    for count in rows:
        features = jax.random.normal(jax.random.key(0), (count, config.decoder_width))
        keys = jax.random.split(jax.random.key(1), count)
        seconds = {}
        for head in ("autoregressive", "parallel"):
            cfg = dataclasses.replace(config, head=head)
            params = unboxed(
                ChannelHead(cfg).init(jax.random.key(0), z, jnp.zeros((1, cfg.channels), jnp.int32))["params"]
            )
            draw = jax.jit(lambda p, z, k, cfg=cfg: draw_channels(cfg, p, z, k, 1.0)[0])
            seconds[head] = seconds_of(functools.partial(draw, params, features, keys))
        for layers in diffusion_layers:
            cfg = dataclasses.replace(config, head="diffusion", diffusion_layers=layers)
            params = unboxed(
                DiffusionHead(cfg).init(jax.random.key(0), z[:, : cfg.channels], jnp.zeros(1), z)["params"]
            )
            draw = jax.jit(lambda p, z, k, cfg=cfg: denoise(cfg, p, z, k, 1.0, steps))
            twice = jnp.repeat(features, 2, 0), jnp.repeat(keys, 2, 0)
            for name, given in {"": (features, keys), ", guided": twice}.items():
                seconds[f"diffusion, {layers} layers{name}"] = seconds_of(functools.partial(draw, params, *given))
        ours = seconds["autoregressive"]
        for name, value in seconds.items():
            found.append(
                {
                    "positions at a time": str(count),
                    "head": name,
                    "ms a position": f"{1000 * value / count:.3g}",
                    "positions a second": f"{count / value:.4g}",
                    "autoregressive is": f"{value / ours:.2f} x as fast",
                }
            )
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenBridgeStudy:
    """Measures quantisation, compares heads on photo patches, and draws images with each head.

    The folders of codes are WORKDIR/codes/NAME: `patches`, and the tokenizer's arms.
    """

    heads: Comparison
    """On the codes of photo patches: 16 channels of one position."""
    tokenizers: Comparison
    models: Comparison
    speed: TokenBridgeConfig
    """The sizes at which the heads are timed."""
    workdir: str
    levels: tuple[int, ...] = (4, 8, 16, 32, 64)
    ranges: tuple[float, ...] = (2.0, 3.0, 5.0)
    sizes: tuple[float, ...] = (0.25, 0.5, 0.75, 0.96, 1.0, 1.25, 1.67, 2.5)
    rows: tuple[int, ...] = (1, 64)
    diffusion_steps: int = 100
    diffusion_layers: tuple[int, ...] = (4, 8)
    patch_levels: int = 16
    patch_range: float = 4.0
    per_class: int = 8
    guidance: float = 2.0

    def run(self) -> bool:
        """Runs everything; returns False if interrupted (the same command resumes it)."""
        folder, console = Path(self.workdir), rich.console.Console()
        self._table("quantization", lambda: quantization_curve(self.levels, self.ranges), self._plot)
        self._table("speed", lambda: head_speeds(self.speed, self.rows, self.diffusion_steps, self.diffusion_layers))
        self.write_patches(folder / "codes" / "patches")
        if not self.heads.run() or not self.tokenizers.run():
            return False
        seed, sources = self.tokenizers.seeds[0], {}
        for arm in self.tokenizers.arms:
            run = self.tokenizers.experiment(arm, seed).directory
            sources[arm.name] = self.latents(run, arm.data)
            tokenize(run, folder / "codes" / arm.name, draws=4 if arm.task.draws_codes else 1)
            if not (picture := folder / f"reconstructions_{arm.name}.png").exists():
                reconstruct(run, picture, count=24)
        normal = np.random.default_rng(0).normal(size=200_000)
        patches = photo_patches(8)
        sources = {"normal": normal, "photo patches": Whitening.of(patches).encode(patches), **sources}
        for count in (16, 64):
            self._table(f"sizes_{count}", lambda count=count: size_table(sources, self.sizes, levels=count))
        if not self.models.run():
            return False
        for arm in self.models.arms:
            run = self.models.experiment(arm, self.models.seeds[0]).directory
            if not (picture := folder / f"samples_{arm.name}.png").exists():
                generate(run, picture, per_class=self.per_class, sampling={"guidance": self.guidance})
        console.print(f"tables and pictures: {folder}", highlight=False, soft_wrap=True)
        return True

    def write_patches(self, folder: Path, train: int = 41_000, held_out: int = 2_000) -> None:
        """Writes codes of overlapping patches; those held out are of other columns of the photos."""
        if folder.exists():
            return
        rng = np.random.default_rng(0)
        first, last = photo_patches(3, columns=(0, 450)), photo_patches(3, columns=(460, 640))
        first, last = rng.permutation(first)[:train], rng.permutation(last)
        whitening = Whitening.of(first)
        values = (self.patch_levels,) * whitening.components.shape[1]
        header, reach = Header(shape=(1, 1), values=values, classes=("photo",)), self.patch_range
        parts = {"train": first, "validation": last[:held_out], "test": last[held_out : 2 * held_out]}
        for split, part in parts.items():
            _, codes = quantized(whitening.encode(part), levels=self.patch_levels, low=-reach, high=reach)
            write_codes(folder / split, header, [(codes[:, None, None], np.zeros(len(codes), int))])

    @staticmethod
    def latents(run: Path, data: ImageData) -> np.ndarray:
        """The latents of the validation images, as the quantiser gets them."""
        tokenizer = open_tokenizer(run)
        draw = jax.jit(lambda images, key: tokenizer.task.latents(tokenizer.params, images, key))
        return np.concatenate(
            [
                np.asarray(draw(as_float(jnp.asarray(batch["images"])), jax.random.key(n)))[batch["mask"] > 0]
                for n, batch in enumerate(dataclasses.replace(data, eval_limit=0).eval_batches("validation"))
            ]
        )

    def _table(self, name: str, make: Callable[[], list[Row]], plot: Callable[[list[Row], Path], None] | None = None):
        """Makes a table once, writes it, and prints it."""
        file = Path(self.workdir) / f"{name}.json"
        if not file.exists():
            rows = make()
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(rows, indent=1))
            file.with_suffix(".md").write_text(markdown(rows) + "\n")
            if plot:
                plot(rows, file.with_suffix(".png"))
        print_table(rich.console.Console(), json.loads(file.read_text()))

    @staticmethod
    def _plot(rows: list[Row], path: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(5, 3.5))
        for reach in dict.fromkeys(row["range"] for row in rows):
            part = [row for row in rows if row["range"] == reach]
            levels = [int(row["levels"]) for row in part]
            for kind, line in (("gaussian", "-"), ("linear", ":")):
                errors = [float(row[f"{kind}: images"]) for row in part]
                axes.plot(levels, errors, line, marker="o", label=f"{kind}, range {reach}")
        axes.set(xscale="log", yscale="log", xlabel="levels", ylabel="squared error / without quantisation")
        axes.legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        plt.close(figure)
