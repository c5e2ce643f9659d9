"""Random and damaged messages at every RPC, damaged files at the reader (``python -m fuzz``, ``make fuzz``)."""
