"""Whether a waiting process was signalled.

FUSE tells the daemon of a signal only while the process waits for that very request. A read through the
page cache waits for a page instead, and the request behind it is the kernel's own: such a reader would
not return from read(2) for a signal that it handles (Ctrl-C in Python) until the page came. Answering
the page's request with EINTR lets it go.
"""

from __future__ import annotations

from pathlib import Path


def pending_signal(task: int) -> bool:
    """Whether a thread has a signal pending that it neither blocks nor ignores, or is gone.

    Args:
        task: its id as the kernel gave it with the request; 0 where it cannot be known (another PID
            name space).
    """
    if task <= 0:
        return False
    try:
        text = Path(f"/proc/{task}/status").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return True
    except PermissionError:
        return False
    return _has_pending(text)


def _has_pending(status: str) -> bool:
    """The same, from the text of /proc/PID/status (proc(5))."""
    masks = dict.fromkeys(("SigPnd", "ShdPnd", "SigBlk", "SigIgn"), 0)
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name in masks:
            masks[name] = int(value, 16)
        elif name == "State" and value.split()[:1] in (["Z"], ["X"]):
            return True
    return bool((masks["SigPnd"] | masks["ShdPnd"]) & ~masks["SigBlk"] & ~masks["SigIgn"])
