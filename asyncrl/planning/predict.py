"""What rate and staleness a setting would give: the real scheduler, queue, budget and loop, with modelled ends.

    machine, workload = Machine.of_run(run), Workload.of_run(run)
    prediction = predict(config, machine, workload, steps=300)
    best = ideal(config, machine, workload)             # what no setting of staleness can exceed
    prediction.samples_per_s / best.samples_per_s
"""

from __future__ import annotations
