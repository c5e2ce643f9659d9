"""The command ``modpressure``: one file for each group of commands."""
