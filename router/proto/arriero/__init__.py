"""Packages of the wire, one folder a version."""
