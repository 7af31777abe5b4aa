"""The order of things: the speculation hierarchy, its session, its processes and its reports."""
