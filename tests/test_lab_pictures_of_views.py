"""Laws of the pictures that the notebook and the command line ask for by a view's name: those of the page."""

import pytest
from typer.testing import CliRunner

from attnlab.export import image
from attnlab.export.lines import draw_lines
from attnlab.export.pictures import VIEWS, choices_of
from attnlab.export.rollout_map import draw_rollout
from attnlab.export.statistic_grid import draw_statistic
from attnlab.export.token_text import draw_token
from attnlab.lab import Lab
from attnlab.views.errors import ViewError
from attnlab.views.rollout import pooled_rollout
from attnlab_webui.cli import app

ASKED = {
    "map": {"layer": 1, "head": 2, "rows": (0, 40)},
    "generation": {"layer": 1, "head": 2},
    "grid": {"name": "entropy"},
    "distances": {"against": (1, 2), "max_rows": 8},
    "heads": {"layer": 1},
    "token": {"layer": 1, "row": 40, "head": 2, "shown": (20, 60)},
    "lines": {"layer": 1, "rows": (0, 20), "cols": (0, 20), "heads": [1, 3]},
    "rollout": {"row": 40},
    "flow": {"row": 40, "span": (20, 41)},
}


@pytest.mark.parametrize("format", image.FORMATS)
@pytest.mark.parametrize("view", ASKED)
def test_every_view_is_a_picture_in_every_format(traced, view, format):
    run = Lab(traced.store).run_by_id(traced.run_ids[0])
    starts = {"png": b"\x89PNG", "svg": b"<svg", "pdf": b"%PDF"}
    assert starts[format] in run.picture(view, format, **ASKED[view])[:200]


def test_the_picture_is_the_one_that_the_page_exports(traced):
    store, run_id = traced.store, traced.run_ids[0]
    run = Lab(store).run_by_id(run_id)
    wanted = {
        "grid": draw_statistic(store, run_id, "entropy"),
        "token": draw_token(store, run_id, 1, 40, 2, shown=(20, 60)),
        "lines": draw_lines(store, run_id, 1, (0, 20), (0, 20), heads=[1, 3]),
    }
    for view, scene in wanted.items():
        assert run.picture(view, "svg", **ASKED[view]) == image.encode(scene, "svg")
    pooled = draw_rollout(store, run_id, pooled_rollout(store, run_id, 10), 0.5)
    assert run.picture("rollout", "svg", height=10) == image.encode(pooled, "svg")


@pytest.mark.parametrize(
    ("view", "choices", "words"),
    [
        ("tokens", {}, "view must be one of map, cross, generation"),
        ("token", {"layer": 1, "line": 3}, "line must be a choice of the view token: layer, row"),
        ("token", {}, "layer must be given for the view token"),
        ("flow", {"row": "x"}, "row must be a whole number; got 'x'"),
        ("image", {"layer": 0, "row": 3}, "patches"),
    ],
)
def test_what_no_picture_can_be_made_of_is_said(traced, view, choices, words):
    run = Lab(traced.store).run_by_id(traced.run_ids[0])
    with pytest.raises(ViewError, match=words):
        run.picture(view, **choices)


def test_what_can_be_chosen_is_named_for_every_view():
    assert all("theme" in choices_of(view) for view in VIEWS)


def test_the_command_line_writes_the_same_picture(traced, sqlite_url, monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNLAB_DATABASE_URL", sqlite_url)
    run = Lab(traced.store).run_by_id(1)
    settings = {
        "lines": ["layer=1", "rows=0:20", "cols=0:20", "heads=1,3"],
        "rollout": ["row=40", "residual=0.25", "sink=true", "theme=dark"],
    }
    chosen = {
        "lines": ASKED["lines"],
        "rollout": {"row": 40, "residual": 0.25, "sink": True, "theme": "dark"},
    }
    for view, given in settings.items():
        path = tmp_path / f"{view}.svg"
        options = [part for one in given for part in ("--set", one)]
        result = CliRunner().invoke(app, ["export", "1", "--view", view, *options, "--out", str(path)])
        assert result.exit_code == 0, result.output
        assert path.read_bytes() == run.picture(view, "svg", **chosen[view])
    broken = ["export", "1", "--view", "token", "--set", "layer", "--out", str(tmp_path / "no.svg")]
    assert CliRunner().invoke(app, broken).exit_code == 2
