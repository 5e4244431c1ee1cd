"""Models: names → files. The registry, the sources they come from, and GGUF headers."""
