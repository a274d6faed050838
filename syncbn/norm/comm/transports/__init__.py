"""The transports by which an exchange reaches the other ranks."""
