"""Where keys and values live (tiers) and which of them a level sees (caches)."""
