"""One file per way of training: a `Config`, and `main(config, ...)`. And checkpoints for loops of your own."""

from __future__ import annotations

from asyncrl.recipes.checkpoints import ResumeInfo, resolve_resume, save_checkpoint

__all__ = ["ResumeInfo", "resolve_resume", "save_checkpoint"]
