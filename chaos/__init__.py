"""Real services over real databases, with faults injected, and clients that keep a diary."""

import os

# Processes are started all the time, and none of them uses what gRPC has open here. Said before gRPC is imported.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
