"""Where the blocks of a model are computed, and whether alike: figures and decisions, without I/O."""
