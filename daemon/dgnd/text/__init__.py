"""Text to token ids and back: tokenizer, chat templates, incremental detokenising, stop matching."""
