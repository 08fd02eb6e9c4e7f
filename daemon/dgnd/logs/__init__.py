"""What the daemon and its workers log: how, how often, and the last lines in memory."""
