"""Watching runs until they have ended: a live line a run on stderr, nothing when stderr is not a terminal."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from attnlab_storage.database import Store, revision
from attnlab_storage.listing import RunRow
from attnlab_webui.commands.console import errors

POLL_SECONDS = 0.25


def mechanism_words(run: RunRow) -> str:
    """`sliding_window window_size=256`"""
    parameters = " ".join(f"{name}={value}" for name, value in run.parameters.items() if value is not None)
    return f"{run.mechanism} {parameters}".rstrip()


def point_words(run: RunRow) -> str:
    """`12  sliding_window window_size=256 · auto · 512 tokens · float32`"""
    tokens = f"{run.sequence_length} tokens" if run.sequence_length else "the text"
    return f"{run.id:>4}  {mechanism_words(run)} · {run.implementation} · {tokens} · {run.dtype}"


class ProgressLines:
    """One line a run; `show` may be called as often as wanted."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[int, TaskID] = {}

    def show(self, runs: Sequence[RunRow]) -> None:
        for run in runs:
            task = self._tasks.get(run.id)
            if task is None:
                task = self._progress.add_task(point_words(run), total=None, start=False, phase=run.state)
                self._tasks[run.id] = task
            if run.state != "queued":
                self._progress.start_task(task)
            running = run.state == "running"
            self._progress.update(
                task,
                phase=(run.phase_name or "starting") if running else run.state,
                completed=1 if run.ended else run.progress_done or 0,
                total=1 if run.ended else run.progress_total,
            )
            if run.ended:
                self._progress.stop_task(task)


@contextmanager
def progress_lines() -> Iterator[ProgressLines]:
    """Draws on stderr while the block runs; without a terminal it draws nothing."""
    console = errors()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[phase]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield ProgressLines(progress)


def watch(
    store: Store, read: Callable[[], Sequence[RunRow]], stop: Callable[[], bool] = lambda: False
) -> None:
    """Shows the runs that `read` returns until all of them have ended, or `stop` says so."""
    seen = None
    with progress_lines() as lines:
        while not stop():
            now = revision(store)
            if now != seen:
                seen = now
                runs = read()
                lines.show(runs)
                if runs and all(run.ended for run in runs):
                    return
            time.sleep(POLL_SECONDS)
