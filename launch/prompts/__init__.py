"""What is read and what is asked of it."""
