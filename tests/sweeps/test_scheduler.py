"""How many trials run at once, and which are stopped early."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from clip2scene.errors import ConfigError
from clip2scene.sweeps.scheduler import scheduler_of
from clip2scene.sweeps.slots import trial_slots
from clip2scene.sweeps.space import TrialResources


@pytest.mark.parametrize(
    ("nodes", "resources", "slots"),
    [
        ([{"CPU": 4}], {}, 4),
        ([{"CPU": 4}], {"threads_per_worker": 3}, 1),
        ([{"CPU": 3}, {"CPU": 3}], {"threads_per_worker": 2}, 2),
        ([{"CPU": 4}], {"num_workers": 2}, 2),
        ([{"CPU": 3}, {"CPU": 2}], {"num_workers": 2}, 2),
        ([{"CPU": 8, "GPU": 2}], {"num_workers": 1, "gpus_per_worker": 1}, 2),
        ([{"CPU": 8, "GPU": 2}], {"num_workers": 1, "gpus_per_worker": 0.5}, 4),
        ([{"CPU": 8, "GPU": 1}], {"num_workers": 1, "gpus_per_worker": 0.4}, 2),  # not 2.5: a worker needs a single GPU
        ([{"CPU": 3, "GPU": 2}], {"num_workers": 1, "gpus_per_worker": 0.25}, 3),
        ([{"CPU": 4, "GPU": 1}, {"CPU": 4, "GPU": 1}], {"num_workers": 2, "gpus_per_worker": 1}, 1),
    ],
)
def test_slots_follow_from_the_workers_that_fit(nodes, resources, slots):
    assert trial_slots(nodes, TrialResources(**resources)) == slots


@pytest.mark.parametrize(
    "resources", [{"threads_per_worker": 5}, {"num_workers": 5}, {"num_workers": 1, "gpus_per_worker": 1}]
)
def test_a_trial_that_fits_nowhere_is_refused(resources):
    with pytest.raises(ConfigError, match="Ray has 4 CPUs and 0 GPUs on 2 nodes"):
        trial_slots([{"CPU": 2}, {"CPU": 2}], TrialResources(**resources))


def test_a_scheduler_remembers_reports_after_a_kill(load, tmp_path):
    from ray.tune.schedulers import TrialScheduler

    stop, go_on = TrialScheduler.STOP, TrialScheduler.CONTINUE
    storage = SimpleNamespace(experiment_fs_path=str(tmp_path))
    trials = [SimpleNamespace(trial_id=str(number), storage=storage) for number in range(4)]
    results = [{"epoch": 1, "objective": objective} for objective in (0.9, 0.8, 0.1, 0.85)]

    def scheduler():
        asha = {"kind": "asha", "grace_epochs": 1, "reduction_factor": 2}
        keys = {"distill.scr.tau": {"uniform": [0.1, 2.0]}}
        made = scheduler_of(load(parameters=keys, num_trials=4, budget={"epochs": 3}, scheduler=asha))
        made.set_search_properties("objective", "max")
        for trial in trials:
            made.on_trial_add(None, trial)
        return made

    def tell(to, *numbers):
        return [to.on_trial_result(None, trials[number], results[number]) for number in numbers]

    undisturbed = tell(scheduler(), 0, 1, 2, 3)
    assert undisturbed[0] == go_on
    assert undisturbed[2] == stop
    (tmp_path / "reported.jsonl").unlink()
    assert tell(scheduler(), 0, 1, 2) == undisturbed[:3]
    # A new driver: three trials report again what they had reported, and one reports for the first time.
    resumed = scheduler()
    assert tell(resumed, 2, 1, 0) == undisturbed[2::-1]
    assert tell(resumed, 3) == undisturbed[3:]


def test_a_trial_that_was_stopped_reports_all_its_epochs_again_after_a_kill(load, tmp_path):
    from ray.tune.schedulers import TrialScheduler

    stop, go_on = TrialScheduler.STOP, TrialScheduler.CONTINUE
    storage = SimpleNamespace(experiment_fs_path=str(tmp_path))
    trials = [SimpleNamespace(trial_id=str(number), storage=storage) for number in range(2)]
    objectives = {0: (0.5, 0.6, 0.7, 0.8), 1: (0.9, 0.5)}  # the second is worse at epoch 2, where it is first compared

    def decisions():
        asha = {"kind": "asha", "grace_epochs": 2, "reduction_factor": 2}
        keys = {"distill.scr.tau": {"uniform": [0.1, 2.0]}}
        made = scheduler_of(load(parameters=keys, num_trials=2, budget={"epochs": 4}, scheduler=asha))
        made.set_search_properties("objective", "max")
        for trial in trials:
            made.on_trial_add(None, trial)
        return [
            [
                made.on_trial_result(None, trials[number], {"epoch": epoch, "objective": objective})
                for epoch, objective in enumerate(reported, start=1)
            ]
            for number, reported in objectives.items()
        ]

    first = decisions()
    assert first == [[go_on, go_on, go_on, stop], [go_on, stop]]
    assert decisions() == first
