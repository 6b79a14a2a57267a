"""Work in a child process that may be killed, with a limit of time."""

import os
import pickle
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

LIMIT = 60.0  # seconds; the work takes less than one


class Outcome(NamedTuple):
    """What became of a child: ``how`` is ``"done"``, ``"raised"``, ``"killed"`` or ``"hang"``."""

    how: str
    value: Any = None  # what it gave back, or the error as (class names, message)
    warnings: tuple[str, ...] = ()


def in_child(work: Callable[[], Any]) -> Outcome:
    """Run ``work`` in a fork of this process."""
    sys.stdout.flush()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _work(work, writing)
    os.close(writing)
    content, hangs = b"", False
    with os.fdopen(reading, "rb") as pipe:
        while True:
            if not select.select([pipe], [], [], LIMIT)[0]:
                hangs = True
                break
            if not (part := os.read(pipe.fileno(), 1 << 20)):
                break
            content += part
    if hangs:
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    if hangs:
        return Outcome("hang")
    return Outcome(*pickle.loads(content)) if content else Outcome("killed")


def _work(work: Callable[[], Any], writing: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            how, value = "done", work()
        except BaseException as error:
            names = [kind.__name__ for kind in type(error).__mro__]
            how, value = "raised", (names, str(error), traceback.format_exc()[-3000:])
    texts = tuple(str(one.message) for one in said)
    with os.fdopen(writing, "wb") as pipe:
        pipe.write(pickle.dumps((how, value, texts)))
    os._exit(0)
