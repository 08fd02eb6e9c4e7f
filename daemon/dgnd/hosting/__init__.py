"""The hops that this node computes for an origin, which may be itself."""
