"""Texts, and the calibration batches made of them."""
