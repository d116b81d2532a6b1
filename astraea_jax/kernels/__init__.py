"""Kernels of query-only sparse attention, and nothing else: one file for each Pallas back end."""
