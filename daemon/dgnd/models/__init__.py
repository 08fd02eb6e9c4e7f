"""The models of this node: their files, their blocks, and how a token is drawn."""
