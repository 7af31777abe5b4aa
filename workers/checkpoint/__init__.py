"""What a checkpoint says before its weights are read: facts, files, vocabulary, and what is refused."""
