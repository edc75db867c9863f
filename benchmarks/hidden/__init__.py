"""Hidden layers over active sets."""
