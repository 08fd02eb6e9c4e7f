"""The origin's side of a session: a route that is laid, driven and mended."""
