"""Sheets of images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

_GAP, _LEGIBLE = 6, 96  # pixels between tiles; the least width of a tile if no scale is given
_FONT = 13
_MARGIN = 3  # above and below a title


def image_grid(
    images: UInt8[np.ndarray, "images height width 3"] | Float[np.ndarray, "images height width 3"],
    columns: int = 8,
    titles: Sequence[str] | None = None,
    scale: int = 0,
) -> Image.Image:
    """The images as one picture, row by row; `image_grid(...).save("grid.png")` writes it.

    Args:
      images: uint8, or floats in [0, 1], which are clipped to that.
      columns: the number of images in a row.
      titles: a line under each image; it is shortened if it is too wide.
      scale: each pixel becomes scale x scale equal pixels; 0: the smallest scale that makes an image at least 96 pixels
        wide.

    Raises:
      ValueError: there is no image, there are too few or too many titles, or a float is not finite.
    """
    pixels = np.asarray(images)
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or not pixels.size:
        raise ValueError(f"the images have the shape {pixels.shape}; it must be [images, height, width, 3].")
    if columns < 1 or scale < 0:
        raise ValueError(f"columns is {columns} and scale {scale}; columns must be at least 1, and scale 0 or more.")
    if titles is not None and len(titles) != len(pixels):
        raise ValueError(f"there are {len(titles)} titles for {len(pixels)} images; give one for each, or none.")
    if pixels.dtype != np.uint8:
        if not np.isfinite(pixels).all():
            raise ValueError("there are pixels that are not finite; check what made them.")
        pixels = np.round(np.clip(pixels.astype(np.float64), 0, 1) * 255).astype(np.uint8)
    count, height, width, _ = pixels.shape
    columns, scale = min(columns, count), scale or max(1, -(-_LEGIBLE // width))
    width, height = width * scale, height * scale
    font = ImageFont.load_default(_FONT)
    line = sum(font.getmetrics()) + 2 * _MARGIN if titles is not None else 0
    rows = -(-count // columns)
    size = (columns * (width + _GAP) + _GAP, rows * (height + line + _GAP) + _GAP)
    sheet = Image.new("RGB", size, (235, 235, 235))
    draw = ImageDraw.Draw(sheet)
    for number, tile in enumerate(pixels):
        row, column = divmod(number, columns)
        x, y = _GAP + column * (width + _GAP), _GAP + row * (height + line + _GAP)
        sheet.paste(Image.fromarray(tile).resize((width, height), Image.Resampling.NEAREST), (x, y))
        if titles is not None:
            text = _shortened(str(titles[number]), width, font)
            draw.text((x + width / 2, y + height + _MARGIN), text, fill=(20, 20, 20), font=font, anchor="ma")
    return sheet


def _shortened(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, or as much of it as fits, with an ellipsis."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1].rstrip()
    return f"{text}…" if text else ""
