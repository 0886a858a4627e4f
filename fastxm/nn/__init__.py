"""Modules with parameters, built on the ops."""
