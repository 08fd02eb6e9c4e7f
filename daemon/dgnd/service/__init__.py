"""The methods of the control API over the parts of a node."""
