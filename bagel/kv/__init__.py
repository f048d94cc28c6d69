"""K/V as content: segments are named by digests of what they hold."""
