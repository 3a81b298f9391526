"""Callbacks: online probes, checkpoints, progress."""
