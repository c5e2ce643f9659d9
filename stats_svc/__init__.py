"""The one kernel that all loaders of a system share: its modules list, its counters and its report."""
