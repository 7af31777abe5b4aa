"""The memory plan before anything is loaded, and what it costs in time."""
