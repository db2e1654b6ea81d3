"""Laws of the zip of an experiment: nothing is lost on the way, nothing harmful gets in, all or nothing."""

import hashlib
import io
import json
import stat
import zipfile
from typing import Any

import numpy as np
import pytest

from attnlab.export import bundle_rules
from attnlab.export.bundle import BundleError, BundleLimits, read_bundle, write_bundle
from attnlab.views import viewport
from attnlab_storage import results
from attnlab_storage.database import Store, migrate, open_store
from attnlab_storage.tables import Base
from attnlab_storage.transfer import dump_experiment


@pytest.fixture
def other(tmp_path):
    url = f"sqlite:///{tmp_path / 'other.db'}"
    migrate(url)
    with open_store(url) as store:
        yield store


@pytest.fixture
def made(sqlite_store, make_traced):
    return make_traced(sqlite_store, outcomes=["unsupported", "out_of_memory"])


@pytest.fixture
def packed(made) -> bytes:
    out = io.BytesIO()
    write_bundle(made.store, made.experiment_id, out)
    return out.getvalue()


def content(store: Store, experiment_id: int) -> list[Any]:
    """All that the store knows of an experiment, with ids replaced by the order in which they come."""
    order: dict[tuple[str, Any], int] = {}

    def renamed(kind, row):
        if (
            kind == "environment"
        ):  # equal ones are one row of the store, which is as old as its first run there
            row = {key: value for key, value in row.items() if key != "created_at"}
        names = {"run_id": "run", "environment_id": "environment", "tensor": "tensor"}
        for key, table in [("id", kind), *names.items()]:
            if row.get(key) is not None:
                row = row | {key: order.setdefault((table, row[key]), len(order))}
        return row

    return [
        (
            part.kind,
            [renamed(part.kind, row) for row in part.rows if row.get("kind") != "imported"],
            part.data,
        )
        for part in dump_experiment(store, experiment_id)
    ]


def counts(store: Store) -> dict[str, int]:
    with store.read() as session:
        tables = [table for table in Base.metadata.sorted_tables if table.name != "revision"]
        return {table.name: session.query(table).count() for table in tables}


def repacked(packed: bytes, change) -> io.BytesIO:
    """The bundle with its members changed by ``change(members: dict, manifest: dict)``."""
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if name != "manifest.json"}
        manifest = json.loads(archive.read("manifest.json"))
    change(members, manifest)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        if manifest is not None:
            archive.writestr("manifest.json", json.dumps(manifest))
    out.seek(0)
    return out


def signed(members, manifest):
    """Makes the manifest's sizes and checksums true again, as somebody who forges a bundle would."""
    for line in manifest["members"]:
        data = members[line["path"]]
        line |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def refused(store, source, says, **limits):
    before = counts(store)
    with pytest.raises(BundleError) as refusal:
        read_bundle(store, source, BundleLimits(**limits))
    assert says in str(refusal.value)
    assert counts(store) == before


def test_an_experiment_comes_back_with_nothing_lost(made, other, packed):
    first = read_bundle(other, io.BytesIO(packed))
    again = io.BytesIO()
    write_bundle(other, first, again)
    again.seek(0)
    second = read_bundle(other, again)
    assert content(other, first) == content(made.store, made.experiment_id)
    assert content(other, second) == content(other, first)
    assert first != second


def test_an_imported_map_is_the_same_map(made, other, packed):
    experiment_id = read_bundle(other, io.BytesIO(packed))
    run_ids = [run.id for run in results.runs_of(other, experiment_id=experiment_id)]
    for old, new in zip(made.run_ids[:2], run_ids, strict=False):
        for layer, head in ((0, 0), (1, 3)):
            here = viewport.viewport(made.store, old, layer, head).values
            np.testing.assert_array_equal(viewport.viewport(other, new, layer, head).values, here)
    assert [run.state for run in results.runs_of(other, experiment_id=experiment_id)] == [
        "succeeded",
        "succeeded",
        "unsupported",
        "out_of_memory",
    ]


def test_a_path_appears_whole_or_not_at_all(made, tmp_path):
    path = tmp_path / "out" / "a.zip"
    path.parent.mkdir()
    write_bundle(made.store, made.experiment_id, path)
    assert read_bundle(made.store, path) != made.experiment_id
    path.unlink()
    with pytest.raises(BundleError, match="there is none with this id"):
        write_bundle(made.store, 999, path)
    assert list(path.parent.iterdir()) == []


def test_the_manifest_names_every_member_with_its_checksum(packed):
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        manifest = json.loads(archive.read("manifest.json"))
        assert (manifest["format"], manifest["version"]) == ("attnlab-experiment", 1)
        assert {line["path"] for line in manifest["members"]} == set(archive.namelist()) - {"manifest.json"}
        for line in manifest["members"]:
            assert hashlib.sha256(archive.read(line["path"])).hexdigest() == line["sha256"]


@pytest.mark.parametrize(
    "name",
    [
        "../evil.json",
        "/etc/passwd",
        "rows/../../evil.json",
        "C:\\evil.bin",
        "rows\\000001-run.json",
        "tensors/1.bin/",
        "rows/",
        "tensors/9.bin\x01.txt",
        "rows/000001-run.json\n",
        "TENSORS/1.bin",
        "extra.txt",
    ],
)
def test_a_member_outside_the_bundle_is_refused(other, packed, name):
    def add(members, manifest):
        members[name] = b"[]"
        manifest["members"].append({"path": name, "kind": "run", "bytes": 2, "sha256": "0"})

    # zipfile cuts a name at NUL when it writes, so that one is put in afterwards
    source = io.BytesIO(repacked(packed, add).getvalue().replace(b"\x01.txt", b"\x00.txt"))
    refused(other, source, "members are manifest.json, rows/*.json and tensors/*.bin")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFDIR, stat.S_IFIFO, stat.S_IFCHR])
def test_a_link_or_a_device_is_refused(other, packed, kind):
    source = repacked(packed, lambda members, manifest: None)
    with zipfile.ZipFile(source, "a") as archive:
        info = zipfile.ZipInfo("tensors/999.bin")
        info.external_attr = (kind | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    refused(other, source, "members are plain files, not links or devices")


def test_a_bomb_is_refused_by_its_ratio_before_it_is_unpacked(other, packed):
    def add(members, manifest):
        members["tensors/99.bin"] = b"\0" * (8 * 2**20)

    refused(other, repacked(packed, add), "unpack to at most 200 times")


def test_sizes_beyond_the_limits_are_refused(other, packed):
    refused(other, io.BytesIO(packed), "a bundle unpacks to at most 10.0 kB", total_bytes=10_000)
    refused(other, io.BytesIO(packed), "rows are at most 100 B a member", rows_bytes=100)
    refused(other, io.BytesIO(packed), "a bundle has at most 3 members", members=3)


def test_a_member_twice_is_refused(other, packed):
    source = io.BytesIO(packed)
    with zipfile.ZipFile(source, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("manifest.json", "{}")
    refused(other, source, "a member is in a bundle once")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_an_unknown_version_is_refused(other, packed, version):
    source = repacked(packed, lambda members, manifest: manifest.update(version=version))
    refused(other, source, f"the bundle has version {version!r}")


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        ("", "manifest.json must be JSON"),
        ("[" * 100_000, "manifest.json must be JSON"),
        ("[]", "must say format 'attnlab-experiment'"),
        ('{"format": "other"}', "must say format 'attnlab-experiment'"),
        (
            '{"format": "attnlab-experiment", "version": 1, "members": [1]}',
            "a line of manifest.json is incomplete",
        ),
        ('{"format": "attnlab-experiment", "version": 1, "members": [{"path": 3}]}', "is incomplete"),
        (
            '{"format": "attnlab-experiment", "version": 1}',
            "an experiment to import must have at least one run",
        ),
    ],
)
def test_a_broken_manifest_is_refused(other, manifest, says):
    source = io.BytesIO()
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("manifest.json", manifest)
    refused(other, source, says)


def test_a_missing_member_is_refused(other, packed):
    for name in ("rows", "tensors"):

        def drop(members, manifest, prefix=name):
            del members[next(path for path in members if path.startswith(prefix))]

        refused(other, repacked(packed, drop), "disagree on 1 members")


@pytest.mark.parametrize("prefix", ["rows/", "tensors/"])
@pytest.mark.parametrize("place", [0, -1])
def test_one_changed_byte_anywhere_is_noticed_and_nothing_stays(other, packed, prefix, place):
    def harm(members, manifest):
        for path in [path for path in members if path.startswith(prefix)][-1:]:
            data = bytearray(members[path])
            data[place] ^= 1
            members[path] = bytes(data)

    refused(other, repacked(packed, harm), "does not have the sha256")


def test_a_damaged_zip_is_refused(other, packed):
    middle = len(packed) // 2
    harmed = packed[:middle] + bytes([packed[middle] ^ 255]) + packed[middle + 1 :]
    refused(other, io.BytesIO(harmed), "")
    refused(other, io.BytesIO(packed[:-30]), "must be a zip written by attnlab export")
    refused(other, io.BytesIO(b""), "must be a zip written by attnlab export")
    refused(other, io.BytesIO(b"no zip at all"), "must be a zip written by attnlab export")


def test_a_manifest_that_lies_about_sizes_is_refused(other, packed):
    def lie(members, manifest):
        manifest["members"][-1]["bytes"] += 1
        manifest["members"][-1]["chunks"][-1][2] += 1

    def short(members, manifest):
        manifest["members"][-1]["chunks"].pop()

    refused(other, repacked(packed, lie), "must have")
    refused(other, repacked(packed, short), "must add up to")


def forge_extra(rows):
    rows[0]["owner"] = "me"


def forge_type(rows):
    rows[0]["batch_size"] = "many"


@pytest.mark.parametrize("forge", [forge_extra, forge_type])
def test_rows_that_no_store_would_have_are_refused_even_with_true_checksums(other, packed, forge):
    def change(members, manifest):
        path = next(line["path"] for line in manifest["members"] if line["kind"] == "run")
        rows = json.loads(members[path])
        forge(rows)
        members[path] = json.dumps(rows).encode()
        signed(members, manifest)

    refused(other, repacked(packed, change), "the bundle holds rows that cannot be stored")


def test_a_tensor_without_all_of_its_chunks_is_refused(other, packed):
    def change(members, manifest):
        line = manifest["members"][-1]
        size = line["chunks"].pop()[2]
        members[line["path"]] = members[line["path"]][:-size]
        signed(members, manifest)

    refused(other, repacked(packed, change), "is missing")


def test_rows_that_are_no_list_are_refused(other, packed):
    def change(members, manifest):
        members[manifest["members"][0]["path"]] = b"{}"
        signed(members, manifest)

    refused(other, repacked(packed, change), "must hold a list of rows")


def test_names_that_pass_stay_inside_any_folder():
    for name in ("manifest.json", "rows/000001-run.json", "tensors/17.bin"):
        assert bundle_rules._PATH.fullmatch(name)


def test_more_rows_than_fit_one_part_come_back_whole(sqlite_store, make_traced, other):
    made = make_traced(
        sqlite_store, tokens=5, layers=140
    )  # 4 heads of 140 layers: more than 500 measurements
    out = io.BytesIO()
    write_bundle(sqlite_store, made.experiment_id, out)
    out.seek(0)
    assert content(other, read_bundle(other, out)) == content(sqlite_store, made.experiment_id)
