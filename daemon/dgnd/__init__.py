"""The daemon of Distributed-GPT-Node."""
