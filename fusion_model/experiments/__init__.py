"""The experiments of arXiv 2208.02402, and those it lacks: `fusion-lm experiment NAME`.

One direction: `texts` → `study` (train, tune, score) → `statistics` → `report` (tables, figures).
"""
