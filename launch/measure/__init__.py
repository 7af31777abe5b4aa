"""Measurements of single parts, each started by python -m launch.measure.NAME."""
