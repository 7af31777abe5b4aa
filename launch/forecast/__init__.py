"""The forecast of a run on a machine: the memory it takes and how fast it should be, with nothing loaded."""
