"""Shards, their order, the stream that reads them, and what happens to a sample on the way."""
