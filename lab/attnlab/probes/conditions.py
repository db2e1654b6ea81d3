"""What else the machine did while something was timed: load, stolen time, other processes' share of the processor."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEAL_LIMIT = 0.01
"""share of the window's processor time that a hypervisor took"""
OTHERS_LIMIT = 0.25
"""cores that other processes kept busy on average"""
SHORT = 0.2
"""seconds: the kernel counts in hundredths, so a shorter window is judged by the load average alone"""
SLOWER = 0.85
"""of the clock before: below it the processor was slowed down (heat, power), not idle, as a step ran just before"""
SPIN = 0.01
"""seconds of work before a clock is read: an idle core is slow for another reason"""
FIELDS = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")


@dataclass(frozen=True)
class _Reading:
    ticks: dict[str, int]
    load: float
    own: float
    at: float
    mhz: float | None


class ProcessorWindow:
    """Around a timing on a CPU: ``with ProcessorWindow() as window: ...``, then ``window.found``.

    Args:
        proc: where ``stat`` and ``loadavg`` are; a system without them finds nothing.
        cores: of the machine.
    """

    def __init__(self, proc: Path = Path("/proc"), cores: int | None = None) -> None:
        self._proc = proc
        self._cores = cores or os.cpu_count() or 1
        self._before: _Reading | None = None
        self.found: dict[str, Any] = {"not_known": f"{proc} has no stat and loadavg", "disturbed": []}

    def __enter__(self) -> "ProcessorWindow":
        self._before = self._read()
        return self

    def __exit__(self, *raised: object) -> None:
        before, after = self._before, self._read()
        if before is not None and after is not None:
            self.found = _judge(before, after, self._cores)

    def is_cool(self) -> bool:
        """Whether the clock is near what it was when the window began; a core that idles is woken up first."""
        until = time.perf_counter() + SPIN
        while time.perf_counter() < until:
            pass
        before = None if self._before is None else self._before.mhz
        return not _slowed(before, self._fastest_core())

    def _read(self) -> _Reading | None:
        try:
            line = (self._proc / "stat").read_text().splitlines()[0]
            load = float((self._proc / "loadavg").read_text().split()[0])
        except OSError:
            return None
        ticks: dict[str, int] = dict(zip(FIELDS, map(int, line.split()[1:]), strict=False))
        return _Reading(ticks, load, time.process_time(), time.monotonic(), self._fastest_core())

    def _fastest_core(self) -> float | None:
        """Clock of the fastest core in MHz, None where the system does not say."""
        try:
            lines = (self._proc / "cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return None
        clocks = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
        return max(clocks, default=None)


class UnknownWindow:
    """Around a timing whose conditions cannot be read: says why."""

    def __init__(self, why: str) -> None:
        self.found: dict[str, Any] = {"not_known": why, "disturbed": []}

    def __enter__(self) -> "UnknownWindow":
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def is_cool(self) -> bool:
        """Nobody knows: there is nothing to wait for."""
        return True


def _judge(before: _Reading, after: _Reading, cores: int) -> dict[str, Any]:
    seconds = after.at - before.at
    spent = {name: after.ticks[name] - ticks for name, ticks in before.ticks.items()}
    total = max(sum(spent.values()), 1)
    steal = spent.get("steal", 0) / total
    busy = sum(spent.values()) - sum(spent.get(name, 0) for name in ("idle", "iowait", "steal"))
    others = max(0.0, busy / os.sysconf("SC_CLK_TCK") - (after.own - before.own)) / max(seconds, 1e-9)
    load = max(before.load, after.load)
    slowed = _slowed(before.mhz, after.mhz)
    reasons = [f"slowed down: {words}" for words in slowed]
    if seconds < SHORT:
        if load > cores:
            reasons.append(f"load average {load:.1f} on {cores} cores")
    else:
        if steal > STEAL_LIMIT:
            reasons.append(f"{100 * steal:.1f} % of the processor stolen by its host")
        if others > OTHERS_LIMIT:
            reasons.append(f"other processes kept {others:.1f} of {cores} cores busy")
    return {
        "seconds": seconds,
        "load_average": [before.load, after.load],
        "steal": None if seconds < SHORT else steal,
        "other_cores": None if seconds < SHORT else others,
        "mhz": [before.mhz, after.mhz],
        "throttled": slowed,
        "disturbed": reasons,
    }


def _slowed(before: float | None, after: float | None) -> list[str]:
    if before is None or after is None or after >= SLOWER * before:
        return []
    return [f"the processor's clock fell from {before:.0f} to {after:.0f} MHz"]
