"""Decoding: sampling, stopping, sessions."""
