"""One experiment as one zip that another store reads back with nothing lost.

The zip holds ``manifest.json`` (format, version, and path, kind, size and sha256 of every other member), rows as
JSON (``rows/000003-measurement.json``), and each tensor's chunks, raw and one after another (``tensors/17.bin``).
Nothing is ever unpacked to disk; what is read goes straight into one transaction, so an import is all or nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from attnlab.export.bundle_rules import (
    FORMAT,
    MANIFEST,
    VERSION,
    BundleError,
    BundleLimits,
    Member,
    check_members,
    parse_json,
    read_manifest,
    read_member,
)
from attnlab_storage.database import Store
from attnlab_storage.transfer import Part, TransferError, dump_experiment, load_experiment

__all__ = ["BundleError", "BundleLimits", "read_bundle", "write_bundle"]

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same content makes the same members


def write_bundle(store: Store, experiment_id: int, target: str | Path | IO[bytes]) -> None:
    """Writes the experiment (deleted runs left out) as a zip; a path appears only when it is complete.

    Raises BundleError when there is no such experiment, OSError where the file cannot be written.
    """
    if not isinstance(target, str | Path):
        _write(store, experiment_id, target)
        return
    path = Path(target)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            _write(store, experiment_id, file)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read_bundle(store: Store, source: str | Path | IO[bytes], limits: BundleLimits | None = None) -> int:
    """Stores the experiment in a zip of `write_bundle` and returns its new id.

    Raises BundleError, with nothing stored, for anything that is not a whole, unharmed bundle of a known version
    within the limits.
    """
    limits = limits or BundleLimits()
    try:
        with zipfile.ZipFile(source) as archive:
            infos = check_members(archive, limits)
            manifest = read_manifest(archive, infos, limits)
            parts = _parts(archive, infos, manifest)
            return load_experiment(store, parts).experiment_id
    except TransferError as error:
        raise BundleError(f"the bundle holds rows that cannot be stored: {error}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise BundleError(f"the file must be a zip written by attnlab export; {error}") from error


def _write(store: Store, experiment_id: int, file: IO[bytes]) -> None:
    members: list[dict[str, Any]] = []
    title: dict[str, Any] = {}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        tensor: _TensorWriter | None = None
        try:
            for part in dump_experiment(store, experiment_id):
                if part.kind == "experiment":
                    title = {"name": part.rows[0]["name"], "spec_hash": part.rows[0]["spec_hash"]}
                if part.data is None:
                    members.append(_write_rows(archive, len(members), part))
                    continue
                row = part.rows[0]
                if tensor is None or tensor.tensor != row["tensor"]:
                    members += [tensor.close()] if tensor else []
                    tensor = _TensorWriter(archive, row["tensor"])
                tensor.add(row, part.data)
        except TransferError as error:
            raise BundleError(str(error)) from error
        members += [tensor.close()] if tensor else []
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "program": f"attnlab {version('attnlab')}",
            "created_at": time.time(),
            "experiment": title,
            "members": members,
        }
        archive.writestr(_info(MANIFEST, zipfile.ZIP_DEFLATED), json.dumps(manifest, indent=1))


def _write_rows(archive: zipfile.ZipFile, number: int, part: Part) -> dict[str, Any]:
    path = f"rows/{number:06d}-{part.kind}.json"
    text = json.dumps(part.rows, allow_nan=False).encode()
    archive.writestr(_info(path, zipfile.ZIP_DEFLATED), text)
    digest = hashlib.sha256(text).hexdigest()
    return {"path": path, "kind": part.kind, "bytes": len(text), "sha256": digest}


class _TensorWriter:
    """The member that a tensor's chunks are appended to."""

    def __init__(self, archive: zipfile.ZipFile, tensor: int) -> None:
        self.tensor = tensor
        self.path = f"tensors/{tensor}.bin"
        self.chunks: list[list[int]] = []
        self._hash = hashlib.sha256()
        self._file = archive.open(_info(self.path, zipfile.ZIP_STORED), "w", force_zip64=True)

    def add(self, row: dict[str, Any], data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.chunks.append([row["head"], row["block"], len(data)])

    def close(self) -> dict[str, Any]:
        self._file.close()
        return {
            "path": self.path,
            "kind": "chunk",
            "bytes": sum(size for _, _, size in self.chunks),
            "sha256": self._hash.hexdigest(),
            "tensor": self.tensor,
            "chunks": self.chunks,
        }


def _info(path: str, compression: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(path, _EPOCH)
    info.compress_type = compression
    info.external_attr = 0o600 << 16
    return info


def _parts(
    archive: zipfile.ZipFile, infos: dict[str, zipfile.ZipInfo], manifest: list[Member]
) -> Iterator[Part]:
    """The members in manifest order, each proved against its sha256; row members before they are parsed."""
    for member in manifest:
        info = infos[member.path]
        if member.kind == "chunk":
            yield from _chunks(archive, info, member)
        else:
            text = b"".join(read_member(archive, info, member, [member.bytes]))
            rows = parse_json(text, member.path)
            if not isinstance(rows, list):
                raise BundleError(f"{member.path} must hold a list of rows; got {type(rows).__name__}")
            yield Part(member.kind, rows)


def _chunks(archive: zipfile.ZipFile, info: zipfile.ZipInfo, member: Member) -> Iterator[Part]:
    sizes = [size for _, _, size in member.chunks]
    pieces = read_member(archive, info, member, sizes)
    # strict also runs the check that stands behind the last piece
    for (head, block, _), data in zip(member.chunks, pieces, strict=True):
        yield Part("chunk", [{"tensor": member.tensor, "head": head, "block": block}], data)
