"""What all programs share: the command line, exit codes, signals, the machine."""
