"""What a view refuses: an argument, its rule, the value and the valid choices, in one sentence."""

from __future__ import annotations


class ViewError(ValueError):
    """A layer, head, region, size or colour map that cannot be shown; the text says what is valid."""


class NotFound(ViewError):
    """There is no run or experiment with this id."""


class NothingRecorded(ViewError):
    """The run exists but holds no map (it did not succeed, or was not asked to record maps)."""
