"""`dgnctl bench` behind the scenes: a process of its own that drives a real worker and measures it."""
