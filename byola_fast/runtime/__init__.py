"""Devices, processes, files, plugins and progress."""
