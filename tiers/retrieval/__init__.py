"""Which tokens of the context the retrieval cache gets."""
