"""One run, in this process or over several: who starts them, guards them and tells them what to be."""
