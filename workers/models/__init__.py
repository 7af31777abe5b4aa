"""transformers models on our caches: facts, loading, reading, recording."""
