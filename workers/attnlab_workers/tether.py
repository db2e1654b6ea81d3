"""Start a command that ends when its parent ends: `python -m attnlab_workers.tether PARENT COMMAND...`.

The kernel keeps the request over exec, so the command need not know. Not a `preexec_fn`: that runs Python
between fork and exec, which is not safe in a process with threads.
"""

import os
import signal
import sys

from attnlab_workers.processes import die_with_parent


def command(*arguments: str) -> list[str]:
    """Arguments that run `arguments` tethered to this process: SIGTERM when this process ends."""
    return [sys.executable, "-m", "attnlab_workers.tether", str(os.getpid()), *arguments]


def main() -> None:
    """Tether this process to its parent, then become the command."""
    parent, *arguments = sys.argv[1:]
    die_with_parent(int(parent), signal.SIGTERM)
    os.execv(arguments[0], arguments)


if __name__ == "__main__":
    main()
