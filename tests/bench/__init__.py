"""Benchmarks against llama.cpp's own tools and `llm`: `python -m tests.bench`, see README.md here."""
