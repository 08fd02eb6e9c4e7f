"""Backends of Distributed-GPT-Node: model files, the plugin seam, and the built-in compute backends."""
