"""Captioned pictures: one file a format."""
