"""The web process: Gradio pages, the HTTP API and the static files, in one FastAPI application.

`build_app(store)` needs only an open store; it loads neither torch nor ray.

The page contract
-----------------
A page is one module in `attnlab_webui.pages`, named in `site_map.PAGES`, with

    def build(store: Store) -> None

which is called once, while its path is the current page of the Blocks: everything it creates lands on that page.
Layout first, then handlers, then wiring. A page

- begins with `pieces.navigation("<key>")`, the bar that every page shares (key as in `PAGES`);
- is drawn from its address by `drawing.draw`, the one owner of its outputs: there is no late answer then;
- passes `**pieces.INTERNAL` (or `**pieces.ACTION` when the wait should show) to every event listener, so that
  no internal handler becomes a public endpoint;
- escapes every string that a person can write with `pieces.escape` before it enters `gr.HTML`;
- draws chips, numbers, tables, notices and empty states with `attnlab_webui.pieces`, so all pages look alike.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from attnlab_webui import api, theme
from attnlab_webui.guard import Guard, check_bind, guard_from_settings
from attnlab_webui.site_map import PAGES, Page

if TYPE_CHECKING:
    from attnlab_storage.database import Store

__all__ = ["PAGES", "Page", "build_app", "check_bind"]


def build_pages(store: Store) -> gr.Blocks:
    """All pages as one multi-page Blocks; nothing is served yet."""
    front, *others = PAGES
    demo = gr.Blocks(title="attnlab", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400))
    with demo:
        _module(front).build(store)
        # what demo.route does, but inside: at the end of every `with` Gradio makes its whole application again
        for page in others:
            demo.pages.append((page.path, page.title, False))
            demo.current_page = page.path
            _module(page).build(store)
    demo.queue(default_concurrency_limit=16, max_size=512, api_open=False)
    return demo


def build_app(store: Store, *, guard: Guard | None = None) -> FastAPI:
    """The whole web application over an open store.

    Args:
        store: an open `Store`; the caller closes it.
        guard: who may ask (hosts, origin, token); read from the environment when not given.
    """
    app = FastAPI(title="attnlab", docs_url=None, redoc_url=None, openapi_url=None)
    api.install(app, store)
    app.mount(theme.STATIC_URL, StaticFiles(directory=theme.STATIC_FOLDER), name="attnlab-static")
    _in_a_loop(lambda: _mount_pages(app, store))
    (guard or guard_from_settings()).install(app)
    return app


def _mount_pages(app: FastAPI, store: Store) -> None:
    with warnings.catch_warnings():
        # said of every multi-page app, also where server-side rendering is not asked for
        warnings.filterwarnings("ignore", "SSR mode is not supported", UserWarning)
        gr.mount_gradio_app(
            app,
            build_pages(store),
            path="/",
            allowed_paths=[],
            show_error=False,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            enable_monitoring=False,
            mcp_server=False,
            pwa=False,
            max_file_size=api.max_upload_bytes(),
            theme=theme.theme(),
            head=theme.head(),
        )


def _in_a_loop(build: Callable[[], None]) -> None:
    """Outside an event loop Gradio makes one for each of its locks, and never closes it."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        with asyncio.Runner() as runner:
            runner.run(_call(build))
    else:
        build()


async def _call(build: Callable[[], None]) -> None:
    build()


def _module(page: Page):  # noqa: ANN202 - a module with build(store)
    return importlib.import_module(f"attnlab_webui.pages.{page.key}")
