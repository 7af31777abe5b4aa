"""Puts a run together: checks, sizes, models, tiers, roles, the engine."""
