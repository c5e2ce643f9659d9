"""``python -m modpressure.cli.child PARENT MODULE ...``: run a module as ``python -m`` does, for as long as a parent.

PARENT is the process id of the parent. The kernel is asked to send SIGTERM when it dies (prctl(2), PR_SET_PDEATHSIG;
Linux alone), by the child itself: between fork and exec little is safe to do.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def main() -> None:
    """Run the module that the command line names."""
    parent, module, *arguments = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it has died in between
        raise SystemExit(1)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
