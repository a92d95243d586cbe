"""What a report shows of a sample: the user's texts, escaped, and images, as PNG inside the page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gradkern._page import escaped

__all__ = ["Showing", "render"]

# Of a text; a page of 50 queries may show a thousand of them.
_MOST_CHARACTERS = 2000
# Longer ones scroll, and so must be within reach of a keyboard.
_SCROLLING_CHARACTERS = 500
# Beside an image, so that it can stand in a row of others.
_CAPTION_CHARACTERS = 60
# The longer side of what is stored of an image; larger ones are made smaller.
_MOST_PIXELS = 256
_IMAGE_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# What other modes of Pillow become. Not among them are those of more than 8 bits: what is white in them is not known.
_CONVERTED = {
    "1": "L",
    **dict.fromkeys(("P", "PA", "LA", "La", "RGBa"), "RGBA"),
    **dict.fromkeys(("RGBX", "CMYK", "YCbCr", "LAB", "HSV"), "RGB"),
}


@dataclass(frozen=True, slots=True)
class Showing:
    """A sample in a page.

    Attributes:
        html: What shows it.
        is_tile: It is an image with a short caption or none, so that several fit beside each other.
    """

    html: str
    is_tile: bool


def render(content: object, name: str, *, side: int) -> Showing:
    """Show what the user gave for a sample or query.

    Args:
        content: A text, an image or a tuple of those, shown in order. An image is an image of Pillow, or an array in
            uint8 (0 to 255), bool or a floating dtype (0 to 1): of shape ``(height, width)`` or, with 1, 3 or 4
            channels (grey, RGB, RGBA), ``(channels, height, width)`` for a tensor and ``(height, width, channels)`` for
            a numpy array.
        name: For who cannot see it, and for errors.
        side: Images are shown about that wide and high: smaller ones in whole multiples of their pixels.

    Raises:
        TypeError: It is something else.
        ValueError: An array has another shape or dtype, or values out of range.
        ImportError: There is an image and Pillow is not installed.
    """
    parts = content if isinstance(content, tuple) else (content,)
    images = [each for each in parts if not isinstance(each, str)]
    texts = [each for each in parts if isinstance(each, str)]
    is_tile = len(images) == 1 and sum(map(len, texts)) <= _CAPTION_CHARACTERS
    shown = [_text(each, name, is_tile) if isinstance(each, str) else _image(each, name, side) for each in parts]
    return Showing("".join(shown), is_tile)


def _text(text: str, name: str, is_caption: bool) -> str:
    if is_caption:
        return f'<span class="caption" dir="auto">{escaped(text)}</span>'
    cut = text[:_MOST_CHARACTERS]
    scrolls = f' tabindex="0" role="region" aria-label="{escaped(name)}"' if len(cut) > _SCROLLING_CHARACTERS else ""
    more = f'<p class="note">The first {len(cut):,} of {len(text):,} characters.</p>' if len(cut) < len(text) else ""
    # The first line feed after the tag is not part of the text.
    return f'<pre dir="auto"{scrolls}>\n{escaped(cut)}</pre>{more}'


def _image(image: object, name: str, side: int) -> str:
    pillow = _pillow()
    if isinstance(image, torch.Tensor | np.ndarray):
        made = pillow.fromarray(_pixels(image, name))
    elif isinstance(image, pillow.Image):
        made = image
    else:
        raise TypeError(
            f"report: {name} is given as {type(image).__name__}, expected a text, an image (tensor, numpy array, or of "
            "Pillow) or a tuple of those"
        )
    if 0 in made.size:
        raise ValueError(f"report: the image of {name} has no pixels, its size is {made.size}")
    if made.mode in _CONVERTED:
        made = made.convert(_CONVERTED[made.mode])
    elif made.mode in _IMAGE_MODES.values():
        made = made.copy()
    else:
        raise ValueError(
            f"report: the image of {name} is of Pillow's mode {made.mode!r}, expected 8 bits a channel; scale it to "
            "0 to 255 and convert it to 'L' or 'RGB'"
        )
    made.info = {}  # what cameras write beside the pixels is nobody's business
    made.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
    buffer = io.BytesIO()
    made.save(buffer, format="PNG", optimize=True)
    width, height = made.size
    longer = max(width, height)
    scale = side // longer if longer <= side else side / longer
    kind = ' class="pixels"' if scale > 1 else ""
    size = f'width="{max(1, round(width * scale))}" height="{max(1, round(height * scale))}"'
    content = base64.b64encode(buffer.getvalue()).decode()
    return f'<img{kind} alt="{escaped(name)}" {size} src="data:image/png;base64,{content}">'


def _pixels(image: torch.Tensor | NDArray[Any], name: str) -> NDArray[np.uint8]:
    """In uint8, of a shape and memory that Pillow takes."""
    given = image
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu()
        given = (given.float() if given.is_floating_point() else given).numpy()
        order = "(channels, height, width)"
        if given.ndim == 3:
            given = given.transpose(1, 2, 0)
    else:
        order = "(height, width, channels)"
    if given.ndim not in (2, 3) or (given.ndim == 3 and given.shape[2] not in _IMAGE_MODES):
        raise ValueError(
            f"report: the image of {name} has shape {tuple(image.shape)}, expected (height, width) or, with 1, 3 or 4 "
            f"channels, {order}; reshape it, or decode what is no image to a text"
        )
    if given.dtype == np.bool_:
        given = given * np.uint8(255)
    elif np.issubdtype(given.dtype, np.floating):
        # One comparison that NaN fails as well.
        if not bool(np.all((given >= 0) & (given <= 1))):
            raise ValueError(
                f"report: the image of {name} has values from {given.min():.3g} to {given.max():.3g}, expected 0 to 1 "
                f"for {image.dtype}; take back what normalised it"
            )
        given = np.rint(given.astype(np.float64) * 255).astype(np.uint8)
    elif given.dtype != np.uint8:
        raise ValueError(f"report: the image of {name} is of {image.dtype}, expected uint8, bool or a floating dtype")
    return np.ascontiguousarray(given[:, :, 0] if given.ndim == 3 and given.shape[2] == 1 else given)


def _pillow() -> ModuleType:
    try:
        from PIL import Image  # lazy: an extra, and for images alone
    except ImportError as error:
        raise ImportError("images in a report need pillow; pip install 'gradkern[plots]'") from error
    return Image
