"""Answers: a request, its conversation, tokens in and text out."""
