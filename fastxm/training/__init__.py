"""The loop, its parts, and one recipe a system."""
