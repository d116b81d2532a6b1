"""Measurements: speed against the operations' own bound, quality against the dense video."""
