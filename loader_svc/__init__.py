"""One replica of the simulated machine: performs finit_module on real files, some CPUs worth of it."""
