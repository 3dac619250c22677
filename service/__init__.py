"""The HTTP service of Secateur: batching, experiments, metrics and the command line."""

__version__ = "0.1.0"
