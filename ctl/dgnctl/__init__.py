"""The command-line client of Distributed-GPT-Node."""
