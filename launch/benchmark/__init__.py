"""Our engine side by side with its peers."""
