"""What memory there is, and whether something fits into it."""
