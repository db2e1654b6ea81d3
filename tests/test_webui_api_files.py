"""Laws of downloads and imports: attachments that read back equal, and uploads that store all or nothing."""

import io
import json
import zipfile

import numpy as np
import pytest
from fastapi import FastAPI
from pyarrow import parquet
from safetensors.numpy import load
from starlette.testclient import TestClient

from attnlab_storage import results
from attnlab_storage.database import open_store
from attnlab_webui import api

EPSILON = 2e-6


def client_of(store) -> TestClient:
    app = FastAPI()
    api.install(app, store)
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def client(traced):
    return client_of(traced.store)


@pytest.fixture
def empty_store(sqlite_template, tmp_path):
    path = tmp_path / "other.db"
    path.write_bytes(sqlite_template.read_bytes())
    with open_store(f"sqlite:///{path}") as store:
        yield store


def paths(traced) -> list[str]:
    run, other = traced.run_ids
    both = f"runs={run},{other}&layer=0&head=1"
    return [
        f"/runs/{run}/export/csv",
        f"/runs/{run}/export/json",
        f"/runs/{run}/export/npz?layer=0&head=1",
        f"/runs/{run}/export/svg?layer=0&head=1&scale=log&clip=99&theme=dark&colormap=magma",
        f"/experiments/{traced.experiment_id}/export/html",
        f"/experiments/{traced.experiment_id}/export/zip",
        f"/compare/export/png?{both}",
        f"/compare/export/pdf?{both}",
        f"/runs/{run}/export/safetensors",
        f"/runs/{run}/export/pdf?layer=1",
        f"/runs/{run}/export/parquet?layer=0&head=1&rows=0:9",
        f"/compare/export/csv?{both}",
    ]


def test_every_download_is_an_attachment_that_no_browser_renders(client, traced):
    for path in paths(traced):
        answer = client.get("/api/v1" + path)
        assert answer.status_code == 200, answer.text
        assert answer.content
        assert answer.headers["content-disposition"].startswith('attachment; filename="attnlab-')


def test_the_array_of_a_region_is_exact(client, traced):
    run_id = traced.run_ids[0]
    path = f"/api/v1/runs/{run_id}/export/npz?layer=1&head=2&rows=10:50&cols=0:30"
    with np.load(io.BytesIO(client.get(path).content), allow_pickle=False) as arrays:
        np.testing.assert_allclose(arrays["map"], traced.reference(run_id, 1, 2)[10:50, :30], atol=EPSILON)
        assert arrays["query_tokens"].tolist() == traced.tokens[10:50]


def test_without_a_head_the_layer_itself_is_given(client, traced):
    run_id = traced.run_ids[0]
    content = client.get(f"/api/v1/runs/{run_id}/export/npz?layer=1").content
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["query"], traced.arrays[run_id, 1]["query"])
        assert arrays["lse"].shape == (4, 77)


def test_compared_maps_come_in_one_file(client, traced):
    a, b = traced.run_ids
    content = client.get(f"/api/v1/compare/export/npz?runs={a},{b}&layer=0&head=3").content
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        for run_id in (a, b):
            np.testing.assert_allclose(arrays[f"map_{run_id}"], traced.reference(run_id, 0, 3), atol=EPSILON)


def test_heads_of_one_run_come_in_one_file_and_one_picture(client, traced):
    run_id = traced.run_ids[0]
    which = f"runs={run_id}&layer=0&head=3&against=1:2"
    content = client.get(f"/api/v1/compare/export/safetensors?{which}").content
    kept = load(content)
    np.testing.assert_allclose(kept[f"map_{run_id}"], traced.reference(run_id, 0, 3), atol=EPSILON)
    np.testing.assert_allclose(kept[f"map_{run_id}_L1H2"], traced.reference(run_id, 1, 2), atol=EPSILON)
    picture = client.get(f"/api/v1/compare/export/svg?{which}")
    assert f"#{run_id} · L0H3 − L1H2" in picture.text


def test_tables_read_back(client, traced):
    experiment = f"/api/v1/experiments/{traced.experiment_id}/export"
    rows = json.loads(client.get(f"{experiment}/json").content)
    table = parquet.read_table(io.BytesIO(client.get(f"{experiment}/parquet").content))
    assert table.num_rows == len(rows)
    assert set(table["run"].to_pylist()) == set(traced.run_ids)


def test_pictures_are_pictures(client, traced):
    run_id = traced.run_ids[0]
    assert client.get(f"/api/v1/runs/{run_id}/export/png?layer=0&head=0").content.startswith(b"\x89PNG")
    svg = client.get(f"/api/v1/runs/{run_id}/export/svg?layer=0&head=0&rows=60:77&cols=60:77").text
    assert "<svg" in svg
    assert "<script>" not in svg


def test_a_bundle_is_read_back_into_another_store(client, traced, empty_store):
    bundle = client.get(f"/api/v1/experiments/{traced.experiment_id}/export/zip").content
    answer = client_of(empty_store).post("/api/v1/import", content=bundle)
    assert answer.status_code == 201, answer.text
    document = answer.json()
    rows = results.runs_of(empty_store, experiment_id=document["experiment"])
    assert [row.id for row in rows] == document["runs"]
    assert [row.mechanism for row in rows] == ["multi_head", "sliding_window"]
    picture = client_of(empty_store).get(f"/api/v1/runs/{rows[0].id}/viewport?layer=0&head=0")
    assert picture.content == client.get(f"/api/v1/runs/{traced.run_ids[0]}/viewport?layer=0&head=0").content


def escaping_zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("../../etc/passwd", "root")
    return file.getvalue()


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "got 0 bytes"),
        (b"this is no zip", 400, "must be a zip written by attnlab export"),
        (escaping_zip(), 400, "../../etc/passwd"),
        (b"x" * 70_000, 413, "at most 65536 bytes here (ATTNLAB_MAX_UPLOAD_BYTES)"),
    ],
    ids=["nothing", "no zip", "escaping", "large"],
)
def test_a_bad_upload_is_refused_and_nothing_is_stored(empty_store, monkeypatch, body, status, words):
    monkeypatch.setenv("ATTNLAB_MAX_UPLOAD_BYTES", "65536")
    answer = client_of(empty_store).post("/api/v1/import", content=body)
    assert answer.status_code == status
    assert words in answer.json()["error"]
    assert results.list_experiments(empty_store).rows == []


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        (
            "/runs/1/export/exe",
            400,
            "format must be one of csv, parquet, json, npz, safetensors, png, svg, pdf, got 'exe'",
        ),
        ("/runs/99/export/csv", 404, "run must be the id of a run, got 99"),
        ("/runs/1/export/pdf", 400, "layer must be given for pdf"),
        (
            "/runs/1/export/csv?layer=0",
            400,
            "format of a whole layer must be one of npz, safetensors, png, svg, pdf",
        ),
        ("/runs/1/export/json?layer=0&head=1", 400, "format of one head must be one of parquet, csv, npz"),
        ("/runs/1/export/png?layer=0&head=9", 400, "head must be in 0..3"),
        (
            "/runs/1/export/png?layer=0&head=0&scale=cubic",
            400,
            "scale must be one of linear, log, row, got 'cubic'",
        ),
        ("/runs/1/export/png?layer=0&head=0&clip=101", 400, "clip must be less than or equal to 100"),
        ("/runs/1/export/png?layer=0&head=0&theme=pink", 400, "theme must be one of light, dark"),
        ("/experiments/1/export/exe", 400, "format must be one of csv, parquet, json, html, zip"),
        ("/experiments/99/export/zip", 404, "experiment must be the id of an experiment"),
        ("/compare/export/csv?runs=1,x", 400, "runs must be run ids separated by commas, got '1,x'"),
        ("/compare/export/csv?runs=" + ",".join(map(str, range(1, 30))), 400, "at most 16 run ids, got 29"),
        ("/compare/export/png?runs=1,2", 400, "layer and head must be given for png"),
        ("/compare/export/png?runs=1,2&layer=0&head=0&pair=1", 400, "pair must be two run ids"),
        ("/compare/export/png?runs=1,2&layer=0&head=0&against=0:1", 400, "against must be LAYER:HEAD of a"),
    ],
)
def test_a_wrong_download_gets_one_sentence(client, path, status, words):
    answer = client.get("/api/v1" + path)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]


def test_pictures_of_views_are_attachments_in_every_format(client, traced):
    run = traced.run_ids[0]
    for path in (
        f"/runs/{run}/grid/export/{{}}?statistic=entropy&theme=dark&scale=log",
        f"/compare/distances/export/{{}}?a={run}&b={traced.run_ids[1]}&measure=spearman&theme=dark",
        f"/compare/distances/export/{{}}?a={run}&against=1:2&max_rows=4",
        f"/runs/{run}/lines/export/{{}}?layer=1&rows=3:20&cols=0:9&heads=0,2&above=0.1",
        f"/runs/{run}/lines/export/{{}}?layer=1&heads=mean",
        f"/runs/{run}/token/export/{{}}?layer=1&head=2&token=30&direction=received&scale=linear",
        f"/runs/{run}/token/export/{{}}?layer=1&heads=mean&shown=0:9&colormap=paper",
    ):
        for form, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
            answer = client.get("/api/v1" + path.format(form))
            assert answer.status_code == 200, answer.text
            assert answer.content.startswith(start)
            assert answer.headers["content-disposition"].endswith(f'.{form}"')


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/runs/1/grid/export/csv", 400, "format must be one of png, svg, pdf, got 'csv'"),
        (
            "/compare/distances/export/csv?a=1&b=2",
            400,
            "format must be one of png, svg, pdf, npz, safetensors, ",
        ),
        ("/compare/distances/export/png?a=1&b=99", 404, "run must be the id of a run, got 99"),
        ("/compare/distances/export/npz?a=1", 400, "other must be a run to compare with, or against a layer"),
        ("/compare/distances/export/png?a=1&against=1", 400, "against must be LAYER:HEAD"),
        ("/runs/99/grid/export/png", 404, "run must be the id of a run, got 99"),
        ("/runs/1/grid/export/png?statistic=charm", 400, "statistic must be one of entropy; got 'charm'"),
        (
            "/runs/1/lines/export/png?layer=0&heads=1,x",
            400,
            "heads must be mean or head numbers separated by",
        ),
        ("/runs/1/lines/export/png?layer=0&heads=9", 400, "heads must be in 0..3; got [9]"),
        ("/runs/1/lines/export/png?layer=0&above=nan", 400, "above must be from 0 to 1; got nan"),
        ("/runs/1/lines/export/png?layer=0&rows=0:77", 400, "rows must be at most 64 tokens; got 0:77"),
        ("/runs/1/lines/export/png?layer=9", 400, "layer must be"),
        ("/runs/1/token/export/png?layer=0&token=77", 400, "row must be in 0..76"),
        ("/runs/1/token/export/png?layer=0&direction=up", 400, "direction must be one of sent, received"),
        ("/runs/1/token/export/png?layer=0&scale=row", 400, "scale must be one of log, linear, got 'row'"),
        ("/runs/1/token/export/png?layer=0&shown=9:9", 400, "shown must be a range"),
        ("/runs/1/rollout/export/png?token=77", 400, "row must be in 0..76"),
        ("/runs/1/rollout/export/png?token=7&through=none", 400, "through must be one of rollout, flow, all"),
        ("/runs/1/grid/export/png?theme=pink", 400, "theme must be one of light, dark"),
    ],
)
def test_a_picture_that_cannot_be_drawn_gets_one_sentence(client, path, status, words):
    answer = client.get("/api/v1" + path)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]


def test_maps_over_other_texts_are_exported_at_the_same_tokens(client, traced, make_traced):
    other = make_traced(traced.store, tokens=30, seed=3)  # both end with the same two tokens
    a, b = traced.run_ids[0], other.run_ids[0]
    which = f"runs={a},{b}&layer=0&head=1"
    content = client.get(f"/api/v1/compare/export/npz?{which}&rows=70:77&cols=20:77").content
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        assert arrays[f"rows_{b}"].tolist() == [28, 30]
        assert arrays[f"query_tokens_{b}"].tolist() == arrays[f"query_tokens_{a}"][-2:].tolist()
        np.testing.assert_allclose(arrays[f"map_{b}"], other.reference(b, 0, 1)[28:30, 20:30], atol=EPSILON)
    picture = client.get(f"/api/v1/compare/export/png?{which}&rows=20:77")
    assert picture.status_code == 200, picture.text
    none = client.get(f"/api/v1/compare/export/png?{which}&rows=40:60&cols=0:9")
    assert none.status_code == 400
    assert f"run {b} has none of the tokens of rows 40:60 and columns 0:9 of run {a}" in none.json()["error"]
