"""What a forward pass sees, and how its attention is computed."""
