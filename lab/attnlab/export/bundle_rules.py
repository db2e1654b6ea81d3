"""What a bundle must be before anything in it is believed: names, sizes, ratios, version, checksums."""

from __future__ import annotations

import hashlib
import json
import re
import stat
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from attnlab.views.labels import format_bytes
from attnlab_storage.transfer import KINDS

FORMAT = "attnlab-experiment"
VERSION = 1
MANIFEST = "manifest.json"
# the only paths there are: no folder, no drive, no dots at either end of a part, no backslash
_PATH = re.compile(r"manifest\.json|rows/[0-9]{6,9}-[a-z]{1,20}\.json|tensors/[0-9]{1,18}\.bin", re.ASCII)
_SMALL = 2**20
MAX_CHUNK = 64 * 2**20


class BundleError(ValueError):
    """A file that cannot be imported (or an experiment that cannot be bundled); nothing was stored."""


@dataclass(frozen=True)
class BundleLimits:
    """How much a bundle may ask for; the defaults fit any real experiment and stop a zip bomb.

    Attributes:
        total_bytes: of all members unpacked.
        rows_bytes: of one member that is parsed as JSON.
        members: how many files the zip may hold.
        ratio: unpacked to packed size of a member over 1 MiB.
    """

    total_bytes: int = 64 * 2**30
    rows_bytes: int = 256 * 2**20
    members: int = 200_000
    ratio: float = 200.0


@dataclass(frozen=True)
class Member:
    """One line of the manifest; ``chunks`` are (head, block, bytes), for members of kind chunk."""

    path: str
    kind: str
    bytes: int
    sha256: str
    tensor: int
    chunks: list[tuple[int, int, int]]


def check_members(archive: zipfile.ZipFile, limits: BundleLimits) -> dict[str, zipfile.ZipInfo]:
    """The zip's members by path, after everything that its directory alone can betray. Raises BundleError."""
    infos = archive.infolist()
    if len(infos) > limits.members:
        raise BundleError(f"a bundle has at most {limits.members} members; got {len(infos)}")
    by_path: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.orig_filename
        if not _PATH.fullmatch(name):
            raise BundleError(f"members are {MANIFEST}, rows/*.json and tensors/*.bin; got {name!r:.200}")
        if name in by_path:
            raise BundleError(f"a member is in a bundle once; got {name!r} twice")
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            raise BundleError(f"members are plain files, not links or devices; got {name!r}")
        if info.flag_bits & 0x1:
            raise BundleError(f"members are not encrypted; got {name!r}")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise BundleError(f"members are stored or deflated; got {name!r} by method {info.compress_type}")
        if info.file_size > _SMALL and info.file_size > limits.ratio * info.compress_size:
            raise BundleError(
                f"members unpack to at most {limits.ratio:g} times their size; {name!r} does not"
            )
        if not name.endswith(".bin") and info.file_size > limits.rows_bytes:
            size = f"{name!r} has {format_bytes(info.file_size)}"
            raise BundleError(f"rows are at most {format_bytes(limits.rows_bytes)} a member; {size}")
        by_path[name] = info
    total = sum(info.file_size for info in infos)
    if total > limits.total_bytes:
        limit = format_bytes(limits.total_bytes)
        raise BundleError(f"a bundle unpacks to at most {limit}; this one says {format_bytes(total)}")
    return by_path


def read_manifest(
    archive: zipfile.ZipFile, infos: dict[str, zipfile.ZipInfo], limits: BundleLimits
) -> list[Member]:
    """The manifest's members, which are exactly the zip's. Raises BundleError."""
    if MANIFEST not in infos:
        raise BundleError(f"a bundle holds {MANIFEST}; this zip was not written by attnlab export")
    with archive.open(infos[MANIFEST]) as file:
        document = parse_json(file.read(limits.rows_bytes + 1), MANIFEST)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise BundleError(
            f"{MANIFEST} must say format {FORMAT!r}; this zip was not written by attnlab export"
        )
    if document.get("version") != VERSION:
        newer = f"this program reads version {VERSION}: use the attnlab that wrote it, or a newer one"
        raise BundleError(f"the bundle has version {document.get('version')!r:.50}; {newer}")
    lines = document.get("members")
    members = [_member(line) for line in lines] if isinstance(lines, list) else []
    named = [member.path for member in members]
    if len(set(named)) < len(named):
        raise BundleError(f"{MANIFEST} names a member twice")
    wrong = sorted({*named, MANIFEST} ^ set(infos))
    if wrong:
        raise BundleError(
            f"the zip and its {MANIFEST} disagree on {len(wrong)} members, such as {wrong[0]!r}"
        )
    for member in members:
        if infos[member.path].file_size != member.bytes:
            found = infos[member.path].file_size
            raise BundleError(f"{member.path} must have {member.bytes} bytes as {MANIFEST} says; got {found}")
    return members


def read_member(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, member: Member, sizes: Sequence[int]
) -> Iterator[bytes]:
    """The member in pieces of these sizes; BundleError at the end unless it is all there and has its sha256."""
    digest = hashlib.sha256()
    with archive.open(info) as file:
        for size in sizes:
            data = file.read(size)
            if len(data) != size:
                raise BundleError(f"{member.path} is cut short: the file is damaged")
            digest.update(data)
            yield data
        if file.read(1) or digest.hexdigest() != member.sha256:
            raise BundleError(
                f"{member.path} does not have the sha256 that {MANIFEST} says: the file is damaged"
            )


def parse_json(text: bytes, path: str) -> Any:
    """JSON text as values; BundleError for anything else."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} must be JSON; {error}") from None


def _member(line: Any) -> Member:
    try:
        chunks = [_chunk(chunk) for chunk in line.get("chunks", [])]
        member = Member(
            line["path"], line["kind"], line["bytes"], line["sha256"], line.get("tensor", 0), chunks
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"a line of {MANIFEST} is incomplete ({error!r}): {line!r:.200}") from None
    whole = isinstance(member.bytes, int) and isinstance(member.tensor, int) and member.kind in KINDS
    if not (whole and isinstance(member.path, str) and isinstance(member.sha256, str)):
        raise BundleError(f"a line of {MANIFEST} has values of the wrong kind: {line!r:.200}")
    if member.kind == "chunk" and sum(size for _, _, size in chunks) != member.bytes:
        raise BundleError(f"the chunks of {member.path} must add up to its {member.bytes} bytes")
    return member


def _chunk(chunk: Any) -> tuple[int, int, int]:
    head, block, size = chunk
    if not all(type(number) is int and number >= 0 for number in (head, block, size)) or size > MAX_CHUNK:
        raise ValueError(f"a chunk is [head, block, bytes] of at most {MAX_CHUNK} bytes")
    return head, block, size
