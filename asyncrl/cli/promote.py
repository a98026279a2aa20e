"""`asyncrl promote RUN[:step-000012] --out DIR [--merge]`"""

from __future__ import annotations

import os
from pathlib import Path

from asyncrl.storage.checkpoints import Checkpoint
from asyncrl.storage.log import open_log


def promote_run(which: str, out: str, *, merge: bool, base_model: str | None) -> int:
    """Write the model, and return the exit code."""
    with open_log(Path(os.devnull)):  # warnings are printed
        from asyncrl.promotion import promote

        source = promote(which, Path(out), merge=merge, base_model=base_model)
    found = source.folder if isinstance(source, Checkpoint) else source
    kind = "an adapter" if (Path(out) / "adapter_config.json").is_file() else "a model"
    print(f"{found} -> {out}: {kind}, as transformers{', peft' if kind == 'an adapter' else ''} and vLLM open it")
    return 0
