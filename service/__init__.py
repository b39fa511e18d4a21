"""The HTTP image: requests in, resources out. Never imports torch."""
