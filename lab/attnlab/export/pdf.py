"""A scene as one page of PDF (ISO 32000-1): text and lines as vectors with the font embedded, cells as an image."""

from __future__ import annotations

import zlib

import numpy as np

from attnlab.export.scene import DASH, Line, Raster, Rect, Scene, Text, drawable, font_bytes
from attnlab.export.truetype import TrueType

POINTS = 0.75  # a pixel of the scene in points of 1/72 inch, as in CSS
_SHARPNESS = 2  # image samples a pixel: viewers smooth an image that they have to enlarge


def to_pdf(scene: Scene) -> bytes:
    """The scene as PDF bytes: the same for the same scene, with no date; characters as `to_png` writes them."""
    document = _Document()
    font = TrueType(font_bytes())
    texts = [drawable(part.text) for part in scene.parts if isinstance(part, Text)]
    used = {font.glyph(char): char for text in texts for char in text}
    images: list[int] = []
    content = [f"{POINTS} 0 0 {POINTS} 0 0 cm", f"{_colour(scene.background)} rg"]
    content.append(f"0 0 {scene.width} {scene.height} re f")
    for part in scene.parts:
        if isinstance(part, Raster):
            content.append(_placed(part, scene.height, len(images)))
            images.append(document.image(_sharp(part)))
        elif isinstance(part, Line):
            content.append(_line(part, scene.height))
        elif isinstance(part, Rect):
            content.append(_rect(part, scene.height))
        else:
            content.append(_text(part, scene.height, font))
    drawn = document.stream("", "\n".join(content).encode())
    names = " ".join(f"/I{i} {number} 0 R" for i, number in enumerate(images))
    opacities = {part.opacity for part in scene.parts if isinstance(part, Line) and part.opacity != 1}
    states = " ".join(f"{_state(one)} << /CA {one:.3f} >>" for one in sorted(opacities))
    fonts = f"/Font << /F {_font(document, font, used)} 0 R >>"
    resources = f"<< {fonts} /XObject << {names} >> /ExtGState << {states} >> >>"
    size = f"[0 0 {scene.width * POINTS:g} {scene.height * POINTS:g}]"
    return document.page(size, resources, drawn, texts[0] if texts else "")


class _Document:
    """Numbered objects in the order in which they are written."""

    def __init__(self) -> None:
        self.objects: list[bytes] = []

    def add(self, body: str | bytes) -> int:
        self.objects.append(body.encode() if isinstance(body, str) else body)
        return len(self.objects)

    def stream(self, entries: str, data: bytes) -> int:
        packed = zlib.compress(data, 6)
        head = f"<< {entries} /Filter /FlateDecode /Length {len(packed)} >>\nstream\n"
        return self.add(head.encode() + packed + b"\nendstream")

    def image(self, pixels: np.ndarray) -> int:
        height, width, _ = pixels.shape
        kind = f"/Type /XObject /Subtype /Image /Width {width} /Height {height}"
        return self.stream(f"{kind} /ColorSpace /DeviceRGB /BitsPerComponent 8", pixels.tobytes())

    def page(self, size: str, resources: str, content: int, title: str) -> bytes:
        """The whole file, with one page and its table of where each object is."""
        parent = len(self.objects) + 2
        entries = f"/Parent {parent} 0 R /MediaBox {size} /Resources {resources} /Contents {content} 0 R"
        page = self.add(f"<< /Type /Page {entries} >>")
        self.add(f"<< /Type /Pages /Kids [{page} 0 R] /Count 1 >>")
        catalog = self.add(f"<< /Type /Catalog /Pages {parent} 0 R >>")
        info = self.add(f"<< /Title {_string(title)} /Producer (attnlab) >>")
        out, places = bytearray(b"%PDF-1.5\n%\xe2\xe3\xcf\xd3\n"), []
        for number, body in enumerate(self.objects, 1):
            places.append(len(out))
            out += f"{number} 0 obj\n".encode() + body + b"\nendobj\n"
        table = "".join(f"{place:010d} 00000 n \n" for place in places)
        count = len(places) + 1
        tail = f"trailer\n<< /Size {count} /Root {catalog} 0 R /Info {info} 0 R >>\nstartxref\n{len(out)}\n"
        return bytes(out) + f"xref\n0 {count}\n0000000000 65535 f \n{table}{tail}%%EOF\n".encode()


def _font(document: _Document, font: TrueType, used: dict[int, str]) -> int:
    """The font with the glyphs that are used, each named by its number, and what each of them means as text."""
    unit = 1000 / font.units
    box = " ".join(f"{edge * unit:.0f}" for edge in font.box)
    data = font.subset(used)
    file = document.stream(f"/Length1 {len(data)}", data)
    rise = f"/Ascent {font.ascent * unit:.0f} /Descent {font.descent * unit:.0f} /CapHeight 700"
    facts = f"/FontName /ATTNLB+Text /Flags 4 /FontBBox [{box}] /ItalicAngle 0 {rise} /StemV 80"
    descriptor = document.add(f"<< /Type /FontDescriptor {facts} /FontFile2 {file} 0 R >>")
    widths = " ".join(f"{glyph} [{font.advance(glyph) * unit:.1f}]" for glyph in sorted(used))
    system = "/CIDSystemInfo << /Registry (Adobe) /Ordering (Identity) /Supplement 0 >>"
    kind = "/Type /Font /Subtype /CIDFontType2 /BaseFont /ATTNLB+Text"
    outlines = document.add(
        f"<< {kind} {system} /FontDescriptor {descriptor} 0 R /W [{widths}] /CIDToGIDMap /Identity >>"
    )
    meaning = document.stream("", _meaning(used).encode())
    kind = "/Type /Font /Subtype /Type0 /BaseFont /ATTNLB+Text /Encoding /Identity-H"
    return document.add(f"<< {kind} /DescendantFonts [{outlines} 0 R] /ToUnicode {meaning} 0 R >>")


def _meaning(used: dict[int, str]) -> str:
    pairs = [f"<{glyph:04X}> <{_utf16(char)}>" for glyph, char in sorted(used.items())]
    blocks = [pairs[i : i + 100] for i in range(0, len(pairs), 100)]  # a block holds no more
    body = "\n".join(f"{len(block)} beginbfchar\n" + "\n".join(block) + "\nendbfchar" for block in blocks)
    return (
        "/CIDInit /ProcSet findresource begin 12 dict begin begincmap /CMapType 2 def\n"
        "/CMapName /Text def 1 begincodespacerange <0000> <FFFF> endcodespacerange\n"
        f"{body}\nendcmap end end\n"
    )


def _text(part: Text, height: int, font: TrueType) -> str:
    glyphs = [font.glyph(char) for char in drawable(part.text)]
    unit = part.size / font.units
    length = unit * sum(font.advance(glyph) for glyph in glyphs)
    back = {"start": 0.0, "middle": 0.5, "end": 1.0}[part.anchor] * length
    drop = unit * (font.ascent + font.descent) / 2
    x, y = part.x, height - part.y
    place = (
        f"0 1 -1 0 {x + drop:.2f} {y - back:.2f}" if part.turn else f"1 0 0 1 {x - back:.2f} {y - drop:.2f}"
    )
    code = "".join(f"{glyph:04X}" for glyph in glyphs)
    return f"BT {_colour(part.color)} rg /F {part.size} Tf {place} Tm <{code}> Tj ET"


def _line(part: Line, height: int) -> str:
    ends = f"{part.x0:.2f} {height - part.y0:.2f} m {part.x1:.2f} {height - part.y1:.2f} l"
    if part.plain:
        return f"{_colour(part.color)} RG 1 w {ends} S"
    look = f"{part.width:.2f} w" + (f" [{DASH[0]} {DASH[1]}] 0 d" if part.dashed else "")
    look += f" {_state(part.opacity)} gs" if part.opacity != 1 else ""
    return f"q {_colour(part.color)} RG {look} {ends} S Q"


def _state(opacity: float) -> str:
    return f"/O{round(1000 * opacity)}"


def _rect(part: Rect, height: int) -> str:
    low = height - part.y - part.height
    return f"{_colour(part.color)} rg {part.x:.2f} {low:.2f} {part.width:.2f} {part.height:.2f} re f"


def _placed(part: Raster, height: int, number: int) -> str:
    return f"q {part.width} 0 0 {part.height} {part.x} {height - part.y - part.height} cm /I{number} Do Q"


def _sharp(part: Raster) -> np.ndarray:
    """Every cell as a block of samples, so that an image of few cells is drawn with hard edges."""
    pixels = np.ascontiguousarray(part.pixels)
    for axis, size in enumerate((part.height, part.width)):
        times = -(-_SHARPNESS * size // pixels.shape[axis])
        pixels = np.repeat(pixels, times, axis)
    return pixels


def _colour(code: str) -> str:
    return " ".join(f"{channel / 255:.4g}" for channel in bytes.fromhex(code.removeprefix("#")))


def _string(text: str) -> str:
    return f"<FEFF{_utf16(text)}>"


def _utf16(text: str) -> str:
    return text.encode("utf-16-be").hex().upper()
