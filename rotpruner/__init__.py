"""Learn orthogonal rotations of a language model so that it prunes well, merge them away, keep a plain checkpoint."""

__version__ = "0.1.0"
