"""The command line, its configs, sweeps and stored results."""
