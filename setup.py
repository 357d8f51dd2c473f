"""Kept for tools that call it; everything is declared in pyproject.toml, and no kernel is compiled at install time."""

from setuptools import setup

setup()
