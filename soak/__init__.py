"""Storms at full rate for as long as one likes, while loaders are replaced (``python -m soak``, ``make soak``)."""

import os

# The supervisor forks while gRPC is at work here, and what it forks executes another program at once.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
