"""How a run ended: what `train` returns, what `summary.json` holds, and what is said last."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncrl.rollout.counts import MEND_REWARDS, not_trained

if TYPE_CHECKING:
    from asyncrl.rollout.estimate import EvalResult
    from asyncrl.rollout.evaluations import Evaluated


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended."""

    run_dir: Path
    steps: int
    """Optimizer steps taken."""
    rollouts: int
    """Rollouts that ended, retries not counted."""
    wall_s: float
    """Training alone: without loading, warm-up and evaluation."""
    worst_staleness: int
    """Of any trained token, in optimizer steps."""
    ledger: dict[str, int]
    """What became of the prompts: trained, filtered, rejected, pending."""
    interrupted: bool
    """A signal ended the run before its time."""
    before: EvalResult | None = None
    """Evaluation of the model that the run started from."""
    after: EvalResult | None = None
    """Evaluation of the trained model."""
    ended_early: str | None = None
    """Why the run ended before its data and its steps did (`signal_patience_groups`); None: it did not."""
    evaluations: tuple[Evaluated, ...] = ()
    """All of them, oldest first; those before and after training too."""
    best: Evaluated | None = None
    """The one with the highest mean reward."""
    evaluations_missed: int = 0
    """Evaluations that were due while another one ran, or came to no result."""
    export_name: str = "model"
    resumed_from: int | None = None
    """The step that this process went on from. None: it started the run."""
    checkpoint: Path | None = None
    """The newest."""

    @property
    def model_dir(self) -> Path:
        """The trained model or adapter, as `transformers`, `peft` and vLLM open it (if `save_model`)."""
        return self.run_dir / self.export_name

    def summary(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "steps": self.steps,
            "rollouts": self.rollouts,
            "wall_s": round(self.wall_s, 3),
            "worst_staleness": self.worst_staleness,
            "interrupted": self.interrupted,
            "ended_early": self.ended_early,
            "resumed_from": self.resumed_from,
            "reward_before": self.before.mean if self.before else None,
            "reward_after": self.after.mean if self.after else None,
            "reward_best": self.best.reward.mean if self.best and self.best.reward else None,
            "best_step": self.best.version if self.best else None,
            "evaluations": len(self.evaluations),
            "evaluations_missed": self.evaluations_missed,
            "ledger": self.ledger,
        }

    def why_nothing_was_trained(self) -> str | None:
        """A warning for whoever waited for nothing."""
        filtered, rejected = self.ledger["filtered"], self.ledger["rejected"]
        if self.steps or not filtered + rejected:
            return None
        why = not_trained(filtered, rejected)
        return f"warning: nothing was trained. Of {self.ledger['admitted']:,} groups, {why}: {MEND_REWARDS}."

    def why_no_more(self, max_steps: int | None) -> str | None:
        """For whoever expected more steps than there were."""
        if self.interrupted or self.ended_early or not self.steps:
            return None
        if max_steps is not None and self.steps < max_steps:
            return (
                f"the data ended after {self.steps} steps, before max_steps={max_steps}: for more, give more rows, or "
                "raise data.epochs"
            )
        if self.resumed_from == self.steps:
            return f"nothing was left to train: the run had its {self.steps} steps before. For more, raise " + (
                "data.epochs" if max_steps is None else "max_steps"
            )
        return None

    def what_was_better(self) -> str | None:
        """For whoever would rather have an earlier model: the best evaluation, where the last one is another."""
        last = self.evaluations[-1] if self.evaluations else None
        if not (self.best and self.best.reward and last and last.reward and self.best.reward.mean > last.reward.mean):
            return None
        return f"the best held-out reward was {self.best.reward}, at step {self.best.version} of {self.steps}"

    def how_to_go_on(self, *, by_command: bool) -> str | None:
        """For whoever stopped it. `by_command`: its settings name the rollout function and the data."""
        if not self.interrupted:
            return None
        if self.checkpoint is None:
            return "there is no checkpoint: nothing was trained, or checkpoint.final is off"
        if by_command:
            return f"go on with it: asyncrl resume {self.run_dir}"
        return f"go on with it: run_dir={str(self.run_dir)!r} in the config, and resume=True"

    def last_words(self, *, saved: bool) -> str:
        """One sentence on how it ended and where the model is."""
        end = "stopped cleanly" if self.interrupted else "ended early" if self.ended_early else "finished"
        why = f", because {self.ended_early}" if self.ended_early and not self.interrupted else ""
        model = f"model: {self.model_dir}" if saved else "the model was not saved (save_model)"
        steps = "1 step" if self.steps == 1 else f"{self.steps:,} steps"
        return f"{end} after {steps} and {self.rollouts:,} rollouts in {self.wall_s:.0f} s{why}; {model}"
