"""A run over several processes: who starts them, guards them and tells them what to be."""
