"""A TrueType font cut down to the glyphs that a document uses, to be embedded in it (OpenType 1.9, `glyf` outlines)."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from functools import cached_property

_EMBEDDED = (b"cvt ", b"fpgm", b"glyf", b"head", b"hhea", b"hmtx", b"loca", b"maxp", b"prep")
# flags of a glyph that is made of others
_WORDS, _SCALE, _MORE, _TWO_SCALES, _MATRIX = 0x0001, 0x0008, 0x0020, 0x0040, 0x0080


class TrueType:
    """The tables of one font (the first of a collection); lengths are in font units, `units` to the em.

    Raises ValueError for a font whose outlines are not TrueType's.
    """

    def __init__(self, data: bytes) -> None:
        start = self._long(data, 12) if data[:4] == b"ttcf" else 0
        records = [
            struct.unpack_from(">4s4xLL", data, start + 12 + 16 * i)
            for i in range(self._short(data, start + 4))
        ]
        self.tables = {tag: data[offset : offset + length] for tag, offset, length in records}
        if b"glyf" not in self.tables:
            raise ValueError(f"font must have TrueType outlines (a glyf table), got {sorted(self.tables)}")
        head, hhea = self.tables[b"head"], self.tables[b"hhea"]
        self.units = self._short(head, 18)
        self.box: tuple[int, int, int, int] = struct.unpack_from(">4h", head, 36)
        self.ascent, self.descent = struct.unpack_from(">2h", hhea, 4)
        self.glyphs = self._short(self.tables[b"maxp"], 4)

    @staticmethod
    def _short(data: bytes, at: int) -> int:
        return struct.unpack_from(">H", data, at)[0]

    @staticmethod
    def _long(data: bytes, at: int) -> int:
        return struct.unpack_from(">L", data, at)[0]

    def glyph(self, char: str) -> int:
        """The glyph of a character; 0, the box of what is missing, where the font has none."""
        return self._characters.get(ord(char), 0)

    def advance(self, glyph: int) -> int:
        """How far the pen moves after a glyph."""
        last = self._short(self.tables[b"hhea"], 34) - 1
        return self._short(self.tables[b"hmtx"], 4 * min(glyph, last))

    def subset(self, glyphs: Iterable[int]) -> bytes:
        """The font with the outlines of these glyphs alone; every glyph keeps its number."""
        kept = self._with_parts({0, *glyphs})
        outlines, places = bytearray(), [0]
        for glyph in range(self.glyphs):
            outlines += self._outline(glyph) if glyph in kept else b""
            outlines += b"\0" * (-len(outlines) % 4)
            places.append(len(outlines))
        head = bytearray(self.tables[b"head"])
        struct.pack_into(">h", head, 50, 1)  # places are of four bytes
        changed = {
            b"glyf": bytes(outlines),
            b"loca": struct.pack(f">{len(places)}L", *places),
            b"head": bytes(head),
        }
        return _font_file({tag: self.tables[tag] for tag in _EMBEDDED if tag in self.tables} | changed)

    @cached_property
    def _characters(self) -> dict[int, int]:
        """Glyphs by code point, of the widest Unicode table that there is."""
        cmap = self.tables[b"cmap"]
        found: dict[int, int] = {}
        for i in range(self._short(cmap, 2)):
            platform, _, offset = struct.unpack_from(">HHL", cmap, 4 + 8 * i)
            form = self._short(cmap, offset)
            if platform in (0, 3) and form in (4, 12):
                found |= _segments(cmap, offset) if form == 4 else _groups(cmap, offset)
        return found

    def _outline(self, glyph: int) -> bytes:
        loca = self.tables[b"loca"]
        if self._short(self.tables[b"head"], 50):
            start, stop = struct.unpack_from(">2L", loca, 4 * glyph)
        else:
            start, stop = (2 * half for half in struct.unpack_from(">2H", loca, 2 * glyph))
        return self.tables[b"glyf"][start:stop]

    def _with_parts(self, glyphs: set[int]) -> set[int]:
        found: set[int] = set()
        waiting = list(glyphs)
        while waiting:
            glyph = waiting.pop()
            if glyph not in found:
                found.add(glyph)
                waiting += _parts(self._outline(glyph))
        return found


def _parts(outline: bytes) -> list[int]:
    """The glyphs that a composite glyph is made of."""
    if len(outline) < 10 or struct.unpack_from(">h", outline)[0] >= 0:
        return []
    parts, at, flags = [], 10, _MORE
    while flags & _MORE:
        flags, part = struct.unpack_from(">HH", outline, at)
        parts.append(part)
        at += 8 if flags & _WORDS else 6
        at += 2 if flags & _SCALE else 4 if flags & _TWO_SCALES else 8 if flags & _MATRIX else 0
    return parts


def _segments(cmap: bytes, offset: int) -> dict[int, int]:
    """Format 4: ranges of 16-bit code points, each with a shift or an array of glyphs."""
    count = struct.unpack_from(">H", cmap, offset + 6)[0] // 2
    ends, starts, shifts, arrays = (
        struct.unpack_from(f">{count}H", cmap, offset + 14 + 2 * count * i + (2 if i else 0))
        for i in range(4)
    )
    found = {}
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        for code in range(start, end + 1 if end < 0xFFFF else end):
            glyph = code
            if arrays[i]:
                at = offset + 16 + 6 * count + 2 * i + arrays[i] + 2 * (code - start)
                glyph = struct.unpack_from(">H", cmap, at)[0]
            if glyph or not arrays[i]:
                found[code] = (glyph + shifts[i]) & 0xFFFF
    return found


def _groups(cmap: bytes, offset: int) -> dict[int, int]:
    """Format 12: ranges of code points that follow each other as their glyphs do."""
    found = {}
    for i in range(struct.unpack_from(">L", cmap, offset + 12)[0]):
        start, end, glyph = struct.unpack_from(">3L", cmap, offset + 16 + 12 * i)
        found |= dict(zip(range(start, end + 1), range(glyph, glyph + end + 1 - start), strict=True))
    return found


def _font_file(tables: dict[bytes, bytes]) -> bytes:
    """Tables behind their directory, each on a boundary of four bytes with its checksum."""
    count = len(tables)
    power = count.bit_length() - 1
    directory = struct.pack(">LHHHH", 0x00010000, count, 16 << power, power, 16 * count - (16 << power))
    body, start = b"", 12 + 16 * count
    for tag, table in sorted(tables.items()):
        padded = table + b"\0" * (-len(table) % 4)
        checksum = sum(struct.unpack(f">{len(padded) // 4}L", padded)) & 0xFFFFFFFF
        directory += struct.pack(">4sLLL", tag, checksum, start + len(body), len(table))
        body += padded
    return directory + body
