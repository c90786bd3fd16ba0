"""Trainer callbacks, one a file."""
