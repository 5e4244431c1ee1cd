"""What MyLLM keeps in SQLite. Must not know models, engines, requests or commands."""
