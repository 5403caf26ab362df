"""Places where a test makes a process die, stall or fail, by name; off unless `KNOWLEDGE_FAILPOINTS` names them.

`KNOWLEDGE_FAILPOINTS=checkpoint.file=kill@3,training.step=sleep:0.5`: a name, what happens there, and at which passing
(at every one without a number). It is read once, from the environment alone: no settings file can switch it on.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter
from typing import NamedTuple

VARIABLE = "KNOWLEDGE_FAILPOINTS"
ACTIONS = ("kill", "stop", "enospc", "oom", "fail", "sleep")


class _Trigger(NamedTuple):
    action: str
    argument: float
    passing: int | None


def is_active() -> bool:
    """Whether the environment names any."""
    return bool(_TRIGGERS)


def failpoint(name: str) -> None:
    """Does what the environment asks for at this place: nothing, as a rule."""
    trigger = _TRIGGERS.get(name)
    if trigger is None:
        return
    _PASSED[name] += 1
    if trigger.passing in {None, _PASSED[name]}:
        _act(name, trigger)


def _act(name: str, trigger: _Trigger) -> None:
    match trigger.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        case "oom":
            raise MemoryError(f"failpoint {name}")
        case "fail":
            raise RuntimeError(f"failpoint {name}")
        case "sleep":
            time.sleep(trigger.argument)


def _parse(text: str) -> dict[str, _Trigger]:
    """Raises ValueError: it is no list of `name=action[:argument][@passing]`."""
    triggers: dict[str, _Trigger] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, what = entry.partition("=")
        action, _, passing = what.partition("@")
        action, _, argument = action.partition(":")
        if not name or action not in ACTIONS:
            raise ValueError(f"{VARIABLE}: {entry!r} is not name=action with one of {', '.join(ACTIONS)}")
        triggers[name] = _Trigger(action, float(argument or 0), int(passing) if passing else None)
    return triggers


_TRIGGERS = _parse(os.environ.get(VARIABLE, ""))
_PASSED: Counter[str] = Counter()
