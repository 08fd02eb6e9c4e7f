"""Looking at the installed backends: each in a child of its own, which may do what it likes."""
