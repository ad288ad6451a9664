"""Speculative decoding, the leader's part: which tokens to draft, and how many. No I/O."""
