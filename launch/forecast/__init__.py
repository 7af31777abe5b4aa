"""What a run takes and how fast it should be on a machine, with nothing loaded."""
