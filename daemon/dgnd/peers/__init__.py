"""What peers tell one another: who they are, what they offer, and frames to them."""
