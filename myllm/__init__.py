"""MyLLM: composable commands that run GGUF models through llama.cpp."""

__version__ = "0.1.0"
