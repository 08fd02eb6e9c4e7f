"""An example of a backend plugin for Distributed-GPT-Node: NumPy in float64."""
