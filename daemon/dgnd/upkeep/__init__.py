"""What a node does about itself: which blocks it takes, its memory, changes, pauses, leaving."""
