"""Texts, the calibration batches made of them, evaluation on texts and on tasks."""
