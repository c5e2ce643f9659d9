"""Kernel identities that come with the package: a text each, and the symbols that the kernel exports."""
