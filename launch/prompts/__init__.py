"""Prompts: texts that are read, and tasks around them."""
