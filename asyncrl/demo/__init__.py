"""`asyncrl demo`: the main job in a few minutes on any machine, from an async function to a better model."""

from asyncrl.demo.command import main

__all__ = ["main"]
