"""Speed and memory, as ratios to a peer or limit of the same run: ``python -m bench``."""
