"""The pages that there are, in the order of the navigation bar."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Page:
    """One page: `key` is its module in `attnlab_webui.pages` and its name in the navigation bar."""

    key: str
    title: str
    path: str  # "" is the front page


PAGES = (
    Page("new", "New experiment", ""),
    Page("queue", "Queue", "queue"),
    Page("experiment", "Experiment", "experiment"),
    Page("compare", "Compare", "compare"),
    Page("mechanisms", "Mechanisms", "mechanisms"),
    Page("advise", "Advise", "advise"),
    Page("claims", "Claims", "claims"),
    Page("kernels", "Kernels", "kernels"),
    Page("system", "System", "system"),
)
