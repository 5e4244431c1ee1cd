"""Models: names → files. The registry, the sources they come from and their conversion, and GGUF headers."""
