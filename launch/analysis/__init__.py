"""How sparse and local a model's attention is, and what each draft cache makes of it."""
