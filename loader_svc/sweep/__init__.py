"""Many boots in virtual time, over processes or a cluster: what to run, what has been run, what came of it."""
