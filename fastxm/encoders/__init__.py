"""Text and image encoders: one file a family."""
