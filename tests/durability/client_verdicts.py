"""Whether a hang of a client came to a good end, and to which."""

from __future__ import annotations

from typing import Any

COMES_BACK = "one replica does not come back, and another serves"
IS_REPLACED = "the supervision takes the replica for stuck or silent, and starts another in its place"
DRAWN_AGAIN = "one request, which has a limit, and is sent again"
NO_OUTAGE = "a clock that bounds outages: without one of longer than that, nobody misses it"
NOT_WATCHED = "a replica that is not watched serves on; that it was lost, or has forgotten, is said by the next request"
HARMLESS = {
    "Endpoint.load": IS_REPLACED,
    "Endpoint.load_adapter": COMES_BACK,
    "Endpoint.load_weights": IS_REPLACED,
    "Endpoint.unload_adapter": IS_REPLACED,
    "Fleet._attend": DRAWN_AGAIN,
    "Fleet.none_up": NO_OUTAGE,
    "Fleet.some_up": DRAWN_AGAIN,
    "LiveAdapters.forgot": NOT_WATCHED,
    "LiveAdapters.give": COMES_BACK,
    "LiveModel.forgot": NOT_WATCHED,
    "LiveModel.until_open": DRAWN_AGAIN,
    "Replica.is_lost_after": DRAWN_AGAIN,
    "Replica.observe": IS_REPLACED,
    "SampleRecorder.flush": "a checkpoint without its samples is better than none",
    "Server._watch": "that the server has ended is seen by its connections",
    "Server.ends_within": COMES_BACK,
    "Supervisor._bound_outages": NO_OUTAGE,
    "Supervisor._bring_back": COMES_BACK,
    "Supervisor._examine": NOT_WATCHED,
    "Supervisor._failed": COMES_BACK,
    "Supervisor._keep": COMES_BACK,
    "Supervisor._watch": NOT_WATCHED,
    "Supervisor.run": NOT_WATCHED,
    "VllmSampler._check_canary": COMES_BACK,
    "VllmSampler._prepare": COMES_BACK,
    "VllmSampler.load": "the window of concurrency stays as it is",
    "_clear": COMES_BACK,
    "_get": NOT_WATCHED,
    "_unload": IS_REPLACED,
    "loaded_models": NOT_WATCHED,
    "wait_until_ready": COMES_BACK,
    "weight_label": NOT_WATCHED,
}
"""A run that hangs here goes on, and loses nothing: why."""

STALLED = 3
WATCHED = "nothing has moved for stall_timeout_s="
SAMPLER_LIMITS = (
    "sampler.start_timeout_s=",
    "sampler.outage_timeout_s,",
    "sampler.request_timeout_s=",
    "publish.timeout_s=",
    "rollout.timeout_s=",
    "the evaluation of version",
)
DISK_LIMITS = ("checkpoint.timeout_s=", "the disk does not take the ledger", "the disk does not take the samples")
NEXT_REQUEST = (
    "answered HTTP 404: The model policy-v",
    "connection lost during /inference",
    "did not say which weights",
)
"""What the next request says of a replica that is not watched."""
LIMITS = {"sampling": SAMPLER_LIMITS, "checkpointing": DISK_LIMITS, "storage": DISK_LIMITS, "training_run": DISK_LIMITS}
"""By the part of asyncrl that hangs: what the error of a shorter limit than the watchdog's says."""


def verdict(outcome: dict[str, Any]) -> str:
    """`not reached`, `harmless`, or what ended it: `watchdog`, `limit`, `next request`; or what is `wrong`."""
    error, point = outcome["error"], outcome["point"]
    if error == "hung":
        return "wrong: it hung"
    if outcome["left"]:
        return f"wrong: it left {outcome['left']}"
    if not outcome["reached"]:
        return "not reached" if outcome["whole"] else f"wrong: it was not reached, and yet: {error}"
    if not error and not outcome["code"]:
        if not outcome["whole"]:
            return "limit" if _told_of_a_limit(outcome["stderr"]) else "wrong: it ended, and is not whole"
        return "harmless" if outcome["function"] in HARMLESS else "wrong: it went on"
    # The file and the line, as who waits for what is told.
    line = f"{point.split(':')[0].rpartition('.')[2]}.py:{outcome['line']})"
    if WATCHED in error or outcome["code"] == STALLED:
        named = line in outcome["report"] + error
        return "watchdog" if named else f"wrong: {line} is not in the report: {error}"
    own = LIMITS.get(point.partition(".")[0].partition(":")[0], ())
    if line in error or any(said in error for said in own):
        return "limit"
    if HARMLESS.get(outcome["function"]) == NOT_WATCHED and any(said in error for said in NEXT_REQUEST):
        return "next request"
    return f"wrong: ended by {error}"


def _told_of_a_limit(stderr: str) -> bool:
    """An evaluation goes on without the rollouts that fail, and says why each did."""
    failed = [line for line in stderr.splitlines() if "an evaluation rollout failed" in line]
    return bool(failed) and all(any(said in line for said in SAMPLER_LIMITS) for line in failed)
