"""Configuration: the typed schema and, beside it, the Hydra groups."""
