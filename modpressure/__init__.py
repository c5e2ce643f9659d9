"""See, predict and fix the memory that loading Linux kernel modules costs."""

__version__ = "0.1.0"
