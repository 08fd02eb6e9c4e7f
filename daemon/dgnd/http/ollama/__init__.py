"""The API that Ollama's clients speak."""
