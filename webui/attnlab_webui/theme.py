"""The look: one Gradio theme, our stylesheet and our ES modules, all served by this process."""

from __future__ import annotations

import hashlib
from pathlib import Path

from gradio.themes import Base
from gradio.themes.utils import colors, fonts, sizes

STATIC_FOLDER = Path(__file__).parent / "static"


def _digest() -> str:
    """Changes whenever a static file does, so that browsers may cache for ever."""
    digest = hashlib.sha256()
    for path in sorted(STATIC_FOLDER.rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(STATIC_FOLDER).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


STATIC_URL = f"/ui/{_digest()}"


def theme() -> Base:
    """Small type, tight spacing, one accent; fonts that ship with Gradio, none from the network."""
    base = Base(
        primary_hue=colors.indigo,
        secondary_hue=colors.indigo,
        neutral_hue=colors.slate,
        text_size=sizes.text_sm,
        spacing_size=sizes.spacing_sm,
        radius_size=sizes.radius_sm,
        font=(
            fonts.LocalFont("IBM Plex Sans", weights=(400, 700)),
            "ui-sans-serif",
            "system-ui",
            "sans-serif",
        ),
        font_mono=(fonts.LocalFont("IBM Plex Mono", weights=(400, 700)), "ui-monospace", "monospace"),
    )
    return base.set(
        body_background_fill="#ffffff",
        body_background_fill_dark="#0d1117",
        background_fill_primary_dark="#0d1117",
        background_fill_secondary_dark="#141a23",
        block_background_fill_dark="#0d1117",
        block_border_width="0px",
        block_shadow="none",
        block_padding="0",
        layout_gap="*spacing_lg",
        input_border_width="1px",
        input_background_fill="#ffffff",
        input_background_fill_dark="#141a23",
        input_border_color="*neutral_300",
        input_border_color_dark="#2c3644",
        button_secondary_background_fill="#ffffff",
        button_secondary_background_fill_dark="#141a23",
        button_secondary_background_fill_hover="#eef0f6",
        button_secondary_background_fill_hover_dark="#1c2431",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="#2c3644",
        button_border_width="1px",
        button_large_padding="6px 14px",
        button_small_padding="3px 10px",
    )


def head() -> str:
    """What every page's <head> holds: our stylesheets and the module that wires the shell."""
    css = "".join(
        f'<link rel="stylesheet" href="{STATIC_URL}/css/{path.name}">'
        for path in sorted((STATIC_FOLDER / "css").glob("*.css"))
    )
    return f'{css}<script type="module" src="{STATIC_URL}/js/shell.js"></script>'


def sign_in_css() -> str:
    """The few rules of the sign-in form, which stands before every other file."""
    return (STATIC_FOLDER / "sign_in.css").read_text(encoding="utf-8")
