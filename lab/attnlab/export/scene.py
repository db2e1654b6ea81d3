"""A picture as a list of primitives, drawn as PNG (Pillow) or as SVG (vector text, raster cells); PDF is in `pdf`."""

from __future__ import annotations

import base64
import io
import math
import os
from dataclasses import dataclass, field
from functools import cache
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Anchor = Literal["start", "middle", "end"]
DASH = (4, 3)  # pixels on and off
_SAMPLES = 3  # a pixel's samples along each side, where lines are smoothed
FONT_STACK = "Inter, 'DejaVu Sans', Helvetica, Arial, sans-serif"
# Pillow's built-in face covers Latin only; the first of these found on the machine covers more
_FONT_FILES = ("DejaVuSans.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "Helvetica.ttc")
_PLAIN = {"⏎": "\\n", "⇥": "\\t", "∅": "<>", "⟨": "<", "⟩": ">", "−": "-", "×": "x", "→": "->"}


@dataclass(frozen=True)
class Text:
    """One line of text; (x, y) is the anchor point at half height. ``turn`` is 0 or 90 (reads upwards)."""

    x: float
    y: float
    text: str
    size: int = 12
    color: str = "#222222"
    anchor: Anchor = "start"
    turn: int = 0


@dataclass(frozen=True)
class Line:
    """A straight line, ``width`` in pixels, ``opacity`` from 0 to 1."""

    x0: float
    y0: float
    x1: float
    y1: float
    color: str = "#888888"
    width: float = 1
    opacity: float = 1
    dashed: bool = False

    @property
    def plain(self) -> bool:
        """Whether it fills whole pixels, so that nothing has to be smoothed."""
        straight = self.x0 == self.x1 or self.y0 == self.y1
        return straight and self.width == 1 and self.opacity == 1 and not self.dashed


@dataclass(frozen=True)
class Raster:
    """Cells as uint8 [rows, columns, 3], each drawn as a sharp rectangle; the whole fills width x height."""

    x: int
    y: int
    width: int
    height: int
    pixels: np.ndarray


@dataclass(frozen=True)
class Rect:
    """A rectangle of one colour."""

    x: float
    y: float
    width: float
    height: float
    color: str


Part = Text | Line | Raster | Rect


@dataclass
class Scene:
    """A canvas of width x height pixels with what is drawn on it, in order."""

    width: int
    height: int
    background: str = "#ffffff"
    parts: list[Part] = field(default_factory=list)

    def add(self, *parts: Part) -> None:
        self.parts.extend(parts)


def outline(x: float, y: float, width: float, height: float, color: str) -> list[Line]:
    """The four sides of a rectangle."""
    right, low = x + width, y + height
    ends = [(x, y, right, y), (right, y, right, low), (right, low, x, low), (x, low, x, y)]
    return [Line(*one, color) for one in ends]


def to_png(scene: Scene) -> bytes:
    """The scene as PNG bytes; characters that no font here has are written as ``\\u4E2D``."""
    image = Image.new("RGB", (scene.width, scene.height), scene.background)
    draw = ImageDraw.Draw(image)
    for smooth, parts in groupby(scene.parts, lambda part: isinstance(part, Line) and not part.plain):
        if smooth:
            _draw_smooth(image, [part for part in parts if isinstance(part, Line)])
            continue
        for part in parts:
            _draw(image, draw, part)
    return png_bytes(image)


def png_bytes(image: Image.Image) -> bytes:
    """A Pillow image as PNG bytes."""
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=False, compress_level=6)
    return out.getvalue()


def to_svg(scene: Scene) -> bytes:
    """The scene as one self-contained SVG document: text and axes as vectors, cells as an embedded PNG."""
    size = f'width="{scene.width}" height="{scene.height}" viewBox="0 0 {scene.width} {scene.height}"'
    body = "".join(_svg_part(part) for part in scene.parts)
    ground = f'<rect width="100%" height="100%" fill="{escape(scene.background)}"/>'
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{FONT_STACK}">{ground}{body}</svg>\n'
    ).encode()


def text_width(text: str, size: int) -> float:
    """Width in pixels of one line of text."""
    return _font(size).getlength(drawable(text))


def shorten(text: str, room: float, size: int) -> str:
    """The text, cut with an ellipsis to fit ``room`` pixels."""
    if text_width(text, size) <= room:
        return text
    while text and text_width(text + "…", size) > room:
        text = text[:-1]
    return text + "…" if text else ""


def drawable(text: str) -> str:
    """The text with characters that the font of pictures lacks in plain ones, or as ``\\u4E2D``."""
    return "".join(_drawable_char(char) for char in text)


def font_bytes() -> bytes:
    """The file of the font that pictures are written in."""
    source = _font(12).path
    if isinstance(source, str | bytes | os.PathLike):
        return Path(os.fsdecode(source)).read_bytes()
    source.seek(0)
    return source.read()


def data_uri(png: bytes) -> str:
    """A PNG as a data URI, for a page that must ask for nothing."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def dashes(line: Line) -> list[tuple[float, float, float, float]]:
    """The pieces of a dashed line, or the one piece of another, as (x0, y0, x1, y1)."""
    across, down = line.x1 - line.x0, line.y1 - line.y0
    length = math.hypot(across, down)
    if not line.dashed or not length:
        return [(line.x0, line.y0, line.x1, line.y1)]
    on, off = DASH
    starts = np.arange(0.0, length, on + off)
    ends = np.minimum(starts + on, length)
    spans = zip((starts / length).tolist(), (ends / length).tolist(), strict=True)
    return [
        (line.x0 + a * across, line.y0 + a * down, line.x0 + b * across, line.y0 + b * down) for a, b in spans
    ]


def _svg_part(part: Part) -> str:
    if isinstance(part, Raster):
        uri = data_uri(png_bytes(Image.fromarray(np.ascontiguousarray(part.pixels))))
        box = f'x="{part.x}" y="{part.y}" width="{part.width}" height="{part.height}"'
        return f'<image {box} preserveAspectRatio="none" style="image-rendering:pixelated" href="{uri}"/>'
    if isinstance(part, Line):
        ends = f'x1="{part.x0:g}" y1="{part.y0:g}" x2="{part.x1:g}" y2="{part.y1:g}"'
        look = "" if part.plain else f' stroke-width="{part.width:.3g}" stroke-opacity="{part.opacity:.3g}"'
        dash = f' stroke-dasharray="{DASH[0]} {DASH[1]}"' if part.dashed else ""
        return f'<line {ends} stroke="{escape(part.color)}"{look}{dash}/>'
    if isinstance(part, Rect):
        box = f'x="{part.x:g}" y="{part.y:g}" width="{part.width:g}" height="{part.height:g}"'
        return f'<rect {box} fill="{escape(part.color)}"/>'
    turn = f' transform="rotate(-90 {part.x:g} {part.y:g})"' if part.turn else ""
    place = f'x="{part.x:g}" y="{part.y:g}" font-size="{part.size}" fill="{escape(part.color)}"'
    align = f'text-anchor="{part.anchor}" dominant-baseline="central" xml:space="preserve"'
    return f"<text {place} {align}{turn}>{escape(_xml_legal(part.text))}</text>"


def _xml_legal(text: str) -> str:
    return "".join(char if char >= " " and not 0xD800 <= ord(char) <= 0xDFFF else "\ufffd" for char in text)


def _draw(image: Image.Image, draw: ImageDraw.ImageDraw, part: Part) -> None:
    if isinstance(part, Raster):
        cells = Image.fromarray(np.ascontiguousarray(part.pixels))
        image.paste(cells.resize((part.width, part.height), Image.Resampling.NEAREST), (part.x, part.y))
    elif isinstance(part, Line):
        draw.line((part.x0, part.y0, part.x1, part.y1), fill=part.color)
    elif isinstance(part, Rect):
        right, low = round(part.x + part.width) - 1, round(part.y + part.height) - 1
        draw.rectangle((round(part.x), round(part.y), right, low), fill=part.color)
    else:
        _draw_text(image, draw, part)


def _draw_smooth(image: Image.Image, lines: list[Line]) -> None:
    """Draws on a larger copy and brings it back; pixels that no line touches stay as they are."""
    large = image.resize((image.width * _SAMPLES, image.height * _SAMPLES), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(large, "RGBA")
    for line in lines:
        color = (*bytes.fromhex(line.color.removeprefix("#")), round(255 * line.opacity))
        for piece in dashes(line):
            ends = [_SAMPLES * end - 0.5 for end in piece]
            draw.line(ends, fill=color, width=max(1, round(_SAMPLES * line.width)))
    image.paste(large.resize(image.size, Image.Resampling.BOX))


def _draw_text(image: Image.Image, draw: ImageDraw.ImageDraw, part: Text) -> None:
    text, font = drawable(part.text), _font(part.size)
    shift = {"start": 0.0, "middle": 0.5, "end": 1.0}[part.anchor] * font.getlength(text)
    if not part.turn:
        draw.text((part.x - shift, part.y), text, fill=part.color, font=font, anchor="lm")
        return
    width, height = int(font.getlength(text)) + 2, int(part.size * 1.6)
    stamp = Image.new("L", (width, height), 0)
    ImageDraw.Draw(stamp).text((0, height / 2), text, fill=255, font=font, anchor="lm")
    stamp = stamp.rotate(90, expand=True)
    top = round(part.y - width + shift)
    image.paste(Image.new("RGB", stamp.size, part.color), (round(part.x - height / 2), top), stamp)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    for name in _FONT_FILES:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    built_in = ImageFont.load_default(size)
    assert isinstance(built_in, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return built_in


@cache
def _drawable_char(char: str) -> str:
    if char.isascii() or _glyph(char) != _glyph("\U0010fffe"):
        return char
    return _PLAIN.get(char, f"\\u{ord(char):04X}")


def _glyph(char: str) -> bytes:
    left, top, right, bottom = _font(16).getbbox(char)
    stamp = Image.new("L", (int(right - left) or 1, int(bottom - top) or 1), 0)
    ImageDraw.Draw(stamp).text((-left, -top), char, fill=255, font=_font(16))
    return stamp.tobytes() + str(stamp.size).encode()
