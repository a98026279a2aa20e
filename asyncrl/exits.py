"""What the exit code of a process says. `asyncrl` ends with them; a script that calls `asyncrl.train` ends with those
that are no error of its own (an error that nobody catches is 1, as everywhere in Python).

    0      finished
    1      the run could not go on
    2      something that the user wrote cannot be used
    3      stalled: nothing moved for too long, or the event loop was blocked; stalled.txt in the run folder says where
    4      cut short: by a second signal, or because a stop took longer than `stop_timeout_s`; resume from a checkpoint
    129    stopped cleanly, as SIGHUP asked: the terminal is gone
    130    stopped cleanly, as SIGINT (Ctrl-C) asked
    143    stopped cleanly, as SIGTERM asked
    141    a command that only prints: nobody read on (`asyncrl inspect RUN | head`)
"""

from __future__ import annotations

FINISHED, FAILED, USER_ERROR, STALLED, CUT_SHORT = range(5)
NO_READER = 141


def stopped_by(signal_number: int) -> int:
    """The exit code after a stop that a signal asked for, by the shells' convention."""
    return 128 + signal_number
