"""Measures how sparse and local a model's attention is, and how much of it each draft cache has in sight."""
