"""A role in a process of its own: messages, heartbeats, streams, threads."""
