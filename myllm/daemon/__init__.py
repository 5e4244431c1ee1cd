"""The background process that keeps models warm: the Unix socket as a front door to a Runtime."""
