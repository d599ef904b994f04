"""Attention of a map's tokens to themselves: in blocks with context, in chunks of queries, from the host."""
