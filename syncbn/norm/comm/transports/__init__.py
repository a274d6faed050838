"""The ways by which an exchange reaches the other ranks."""
