"""The peer protocol `/dgn/1`: messages, their bytes, and the rules of their order. Sans-IO."""
