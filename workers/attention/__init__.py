"""A forward pass: what it sees, and how its attention is computed."""
