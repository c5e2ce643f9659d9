"""The virtual driver: the one pipeline, carried through by a clock instead of by the operating system."""
