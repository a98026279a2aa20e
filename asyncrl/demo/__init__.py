"""`asyncrl demo`: the main job in a few minutes on any machine, from an async function to a better model."""

from asyncrl.demo.command import run_demo

__all__ = ["run_demo"]
