"""The worker process: one backend plugin, its spans, and the schedule of their steps."""
